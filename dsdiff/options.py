"""The options of a picture, as frozen values that check themselves. Nothing here imports torch.

None means "the default of the model, or of the file": `dsdiff.pipeline` puts those in.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from dsdiff.checks import check_choice, check_whole
from qdiff.config import ACT_RANGES
from tomesd.options import MergeOptions

__all__ = [
    "DrawOptions",
    "EmbeddingOptions",
    "InitOptions",
    "LoraOptions",
    "MergeOptions",
    "ModelOptions",
    "QuantizationOptions",
]

SAMPLERS = ("ddim", "plms", "dpm_solver", "euler", "euler_a", "dpmpp_2m_karras", "unipc", "lcm", "tcd")
STOCHASTIC = ("ddim", "euler_a", "tcd")  # those for which eta has a meaning
FEW_STEP = ("lcm", "tcd")  # those of models distilled to few steps, and of LoRAs that make such models
PRECISIONS = ("autocast", "full")
VAES = ("float32", "bf16", "int8", "tiny")
ENGINES = ("int8", "simulate")
CALIBRATION_ENGINE = "calibration"  # the layers that calibration knows, not lowered; for measuring, not for drawing
QUANT_MODES = ("qdiff", "linear")
LONG_PROMPTS = ("chunk", "cut")
RESIZES = ("crop", "stretch")
BITS = range(2, 17)
MAX_BLUR = 10_000  # pixels; Pillow crashes at radii beyond the range of its integers


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to use, by its files.

    ckpt: the model's weights (a file, a folder as diffusers saves it, or owner/name[@revision] on the hub), or a
        bundle. None takes those of the config, under models/ldm.
    config: the model's yaml. None takes Stable Diffusion v1's if its checkpoint is there or `ckpt` is given, else the
        embedded model's.
    tokenizer: the folder with the tokenizer's files. None looks beside the checkpoint.
    vae_ckpt: another autoencoder for the model: a file, a folder or a hub id. None takes the checkpoint's.
    """

    ckpt: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    vae_ckpt: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """A LoRA to apply: its file, and the scale of its changes, which may be negative. 0 changes nothing.

    Raises ValueError for a scale that is no finite number.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale):
            raise ValueError(f"the scale of LoRA {str(self.path)!r} is {self.scale!r}: it must be a finite number")

    @classmethod
    def parse(cls, text: str) -> "LoraOptions":
        """Return what FILE or FILE:SCALE means. Only a number after the last colon is a scale, and no file's name."""
        path, colon, end = text.rpartition(":")
        try:
            scale = float(end) if colon and path and not Path(text).exists() else None
        except ValueError:
            scale = None
        return cls(path=Path(text)) if scale is None else cls(path=Path(path), scale=scale)

    @classmethod
    def of(cls, lora: "LoraOptions | str | Path | tuple[str | Path, float]") -> "LoraOptions":
        """Return the options that a file, or a file and its scale, mean."""
        if isinstance(lora, LoraOptions):
            return lora
        path, scale = lora if isinstance(lora, tuple) else (lora, 1.0)
        return cls(path=Path(path), scale=scale)


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """An embedding of textual inversion: its file, and the name that stands for it in prompts.

    name: None takes the token that a file in diffusers' layout names, else the file's name without its ending.
    Raises ValueError for a name with spaces, or an empty one.
    """

    path: Path
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name or any(letter.isspace() for letter in self.name)):
            raise ValueError(f"embedding {str(self.path)!r} cannot have the name {self.name!r}: use one word")

    @classmethod
    def parse(cls, text: str) -> "EmbeddingOptions":
        """Return what FILE or FILE:NAME means. A file whose own name has the colon in it is taken as FILE."""
        path, colon, name = text.rpartition(":")
        whole = not colon or not path or Path(text).exists() or "/" in name or "\\" in name
        return cls(path=Path(text)) if whole else cls(path=Path(path), name=name)

    @classmethod
    def of(cls, embedding: "EmbeddingOptions | str | Path | tuple[str | Path, str]") -> "EmbeddingOptions":
        """Return the options that a file, or a file and its name, mean."""
        if isinstance(embedding, EmbeddingOptions):
            return embedding
        path, name = embedding if isinstance(embedding, tuple) else (embedding, None)
        return cls(path=Path(path), name=name)


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """How a picture is drawn from another one.

    strength: the share of the steps that are taken, in (0, 1]. The picture gets the noise of the first step taken; at 1
        next to nothing of it is left.
    resize: how a picture of another size gets the size that is drawn. "crop" scales it until it covers that size, and
        cuts off the rest evenly on both sides; "stretch" scales width and height separately.
    mask_blur: with a mask, the radius in pixels over which the drawn part fades into the picture; 0..MAX_BLUR.
    paste: with a mask, put the picture's own pixels back outside of it. False leaves those of the decoder.
    Raises ValueError for a value out of range.
    """

    strength: float = 0.75
    resize: str = "crop"
    mask_blur: float = 4.0
    paste: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength!r}: it must be above 0, and 1 at most")
        check_choice("resize", self.resize, RESIZES)
        if not 0 <= self.mask_blur <= MAX_BLUR:
            raise ValueError(f"mask_blur is {self.mask_blur!r}: it must be a number of pixels in 0..{MAX_BLUR}")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How to draw pictures. None stands for the model's default.

    height, width: the size in pixels, in multiples of the model's factor (8).
    sampler: one of SAMPLERS.
    steps: the number of sampling steps. DDIM and PLMS take more where it does not divide the model's timesteps. None is
        4 for samplers of FEW_STEP.
    eta: the share of noise that samplers of STOCHASTIC add back at each step, in [0, 1]; 0 is deterministic. None is 0
        for ddim, 1 for euler_a and 0.3 for tcd, which calls it gamma.
    scale: the guidance scale s in eps = eps_u + s (eps_c - eps_u), 0 or more; 1 is no guidance. None is 1 for samplers
        of FEW_STEP, except for models that take the scale as an input (full LCM checkpoints).
    negative_prompt: the text that guidance leads away from.
    prompt_weights: brackets in prompts give weights, (word:1.2), (word), [word]; False takes them as text.
    long_prompts: a prompt of more tokens than the text encoder sees at once (75 in Stable Diffusion) is read in chunks
        ("chunk"), or cut with a warning ("cut").
    guidance_start, guidance_stop: the shares of the steps between which there is guidance, 0 <= start <= stop <= 1:
        step i of n is guided if start <= i / n < stop. The others take one sample of the UNet in place of two.
    cache: the whole UNet is computed in every cache-th step only; the other steps compute its ends, on the deep
        features of the last whole step (DeepCache). 1 computes all of it in all steps. A path is a file of
        scripts/schedule_cache.py, which names the whole steps for one sampler and number of steps.
    cache_depth: how many input and output blocks are the ends, 1 or more. A file of `cache` has its own.
    precision: that of the UNet. "autocast" is bfloat16 (float16 on a GPU without it), "full" is float32. None is
        autocast on a GPU, and for quantized activations on a CPU that has bfloat16; else full.
    vae: the decoder of the autoencoder. "float32", "bf16" (bfloat16, the last norm and convolution in float32) or
        "int8" (integers; for bundles that have its ranges). None takes the fastest of these that the CPU and the
        model have, on a GPU float32. "tiny" is a small decoder of its own, much faster and a little coarser (TAESD).
    vae_tiling: decode in overlapping stripes, for large pictures on little memory; slower.
    tiny_decoder: the file of the tiny decoder. None takes the one that comes with the model.
    merge: the token merging; None merges none.
    init: how pictures are drawn from others; None draws them from noise alone.
    Raises ValueError for a value that no model can have, and for one that would have no effect.
    """

    height: int | None = None
    width: int | None = None
    sampler: str = "ddim"
    steps: int | None = None
    eta: float | None = None
    scale: float | None = None
    negative_prompt: str = ""
    prompt_weights: bool = True
    long_prompts: str = "chunk"
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache: int | Path = 1
    cache_depth: int = 1
    precision: str | None = None
    vae: str | None = None
    vae_tiling: bool = False
    tiny_decoder: Path | None = None
    merge: MergeOptions | None = None
    init: InitOptions | None = None

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("long_prompts", self.long_prompts, LONG_PROMPTS)
        check_choice("precision", self.precision, PRECISIONS, optional=True)
        check_choice("vae", self.vae, VAES, optional=True)
        if self.tiny_decoder is not None and self.vae != "tiny":
            raise ValueError("tiny_decoder has no effect without vae tiny: leave it out, or give both")
        if self.vae_tiling and self.vae == "tiny":
            raise ValueError("vae_tiling has no effect with vae tiny, which takes little memory: leave it out")
        for name in ("height", "width", "steps"):
            check_whole(name, getattr(self, name), 1, optional=True)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}: it must lie in [0, 1]")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale is {self.scale!r}: it must be a finite number of 0 or more")
        if self.eta and self.sampler not in STOCHASTIC:
            raise ValueError(
                f"eta {self.eta:g} has no effect with {self.sampler}: leave it out, it is for {', '.join(STOCHASTIC)}"
            )
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise ValueError(
                f"guidance_start is {self.guidance_start!r} and guidance_stop {self.guidance_stop!r}: they must lie in "
                "[0, 1], in this order"
            )
        self._check_cache()
        if self.scale == 1:
            self.check_guidance("with scale 1, which is no guidance: use a larger scale")

    def _check_cache(self) -> None:
        for name in ("cache", "cache_depth"):
            value = getattr(self, name)
            if name != "cache" or not isinstance(value, Path):
                check_whole(name, value, 1)
        if self.cache == 1 and self.cache_depth != 1:
            raise ValueError("cache_depth has no effect without cache: leave it out, or give a cache of 2 or more")
        if isinstance(self.cache, Path) and self.cache_depth != 1:
            raise ValueError(f"cache_depth has no effect with {str(self.cache)!r}, which has its own: leave it out")

    def check_guidance(self, why: str) -> None:
        """Raise ValueError if there are options of guidance, which have no effect. why: the reason, and the way out."""
        if self.negative_prompt:
            raise ValueError(f"a negative prompt has no effect {why}")
        if (self.guidance_start, self.guidance_stop) != (0, 1):
            raise ValueError(f"guidance_start and guidance_stop have no effect {why}")


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How to read a calibrated model. None leaves a setting to its file.

    cali_ckpt: the file. None takes the one that comes with the model.
    weight_bit, act_bit, sm_abit: the bits of weights, activations and softmax outputs, in 2..16. The file must have
        been made with these.
    act_range, split, quant_mode: further settings that the file must have been made with, see QuantConfig.
    quant_act: True asks for quantized activations, False leaves them float. With None the file decides; but as soon as
        one of weight_bit, act_bit, sm_abit, split and quant_mode is given they stay float, as in the command lines of
        the original work.
    engine: "int8" computes in integers, "simulate" in floats that hold integers. None takes int8 on CPUs
        that can, and on GPUs with our kernels, else simulate. "calibration" keeps the layers that calibration works on.
    low_memory: keep weights packed while drawing, for int8 and weights of 4 bits or less; slower.
    cond: require a model that takes prompts.
    no_grad_ckpt: switch gradient checkpointing off, which has no effect on pictures.
    Raises ValueError for a value out of range.
    """

    cali_ckpt: Path | None = None
    weight_bit: int | None = None
    quant_act: bool | None = None
    act_bit: int | None = None
    sm_abit: int | None = None
    act_range: str | None = None
    split: bool | None = None
    quant_mode: str | None = None
    engine: str | None = None
    low_memory: bool = False
    cond: bool = False
    no_grad_ckpt: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bit", "act_bit", "sm_abit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value not in BITS):
                raise ValueError(f"{name} is {value!r}: it must be a whole number in {BITS[0]}..{BITS[-1]}")
        check_choice("act_range", self.act_range, ACT_RANGES, optional=True)
        check_choice("quant_mode", self.quant_mode, QUANT_MODES, optional=True)
        check_choice("engine", self.engine, (*ENGINES, CALIBRATION_ENGINE), optional=True)

    @property
    def names_settings(self) -> bool:
        """True if a setting is given that makes None of `quant_act` mean False, as in the original work."""
        named = (self.weight_bit, self.act_bit, self.sm_abit, self.split, self.quant_mode)
        return any(value is not None for value in named)
