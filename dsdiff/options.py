"""The options of a picture, as frozen values that check themselves. Nothing here imports torch.

None means "the default of the model, or of the file": `dsdiff.pipeline` puts those in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tomesd.options import MergeOptions

__all__ = ["DrawOptions", "MergeOptions", "ModelOptions", "QuantizationOptions"]

SAMPLERS = ("ddim", "plms", "dpm_solver")
PRECISIONS = ("autocast", "full")
ENGINES = ("int8", "simulate")
CALIBRATION_ENGINE = "calibration"  # the layers that calibration knows, not lowered; for measuring, not for drawing
QUANT_MODES = ("qdiff", "linear")
BITS = range(2, 17)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model: its files.

    ckpt: a model's weights, or a bundle (None: those of the config under models/ldm). config: the model's yaml (None:
    Stable Diffusion v1's if its checkpoint is there or `ckpt` is given, else the embedded model's). tokenizer: the
    folder of the tokenizer's files (None: beside the checkpoint).
    """

    ckpt: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How pictures are drawn.

    height, width: in pixels, multiples of the model's factor. sampler: one of SAMPLERS. steps: asked for; DDIM and PLMS
    may take more. eta: noise that DDIM puts back at each step, in [0, 1]. scale: of guidance,
    eps = eps_u + scale (eps_c - eps_u); 1 is none. negative_prompt: what guidance leads away from. precision: of the
    UNet, "autocast" is bfloat16 (float16 on a GPU without it), "full" is float32. merge: token merging, None for none.
    Raises ValueError for a value that no model can have, or one without effect.
    """

    height: int | None = None
    width: int | None = None
    sampler: str = "ddim"
    steps: int | None = None
    eta: float = 0.0
    scale: float | None = None
    negative_prompt: str = ""
    precision: str | None = None
    merge: MergeOptions | None = None

    def __post_init__(self) -> None:
        _check_choice("sampler", self.sampler, SAMPLERS)
        if self.precision is not None:
            _check_choice("precision", self.precision, PRECISIONS)
        for name in ("height", "width", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}: it must be a whole number of 1 or more")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}: it must lie in [0, 1]")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale is {self.scale!r}: it must be a finite number of 0 or more")
        if self.eta and self.sampler != "ddim":
            raise ValueError(
                f"eta {self.eta:g} has no effect with {self.sampler}, which is deterministic: leave it out"
            )
        if self.negative_prompt and self.scale == 1:
            raise ValueError("a negative prompt has no effect with scale 1, which is no guidance: use a larger scale")


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """Options that a calibrated model is read by; None leaves one to the file.

    cali_ckpt: the file (None: the model's own). weight_bit, act_bit, sm_abit, split, quant_mode: what it must have been
    made with. quant_act: True asks for quantized activations, False leaves them float. With None the file decides, or,
    as soon as one of the settings before is given, they stay float: that is how the original work's command lines read.
    engine: "int8" computes in integers, "simulate" in floats that hold integers, None is int8 where it can; with
    "calibration" the layers stay those that calibration knows. low_memory: keep weights packed while drawing.
    cond: the model must be a conditional one. no_grad_ckpt: switch gradient checkpointing off.
    """

    cali_ckpt: Path | None = None
    weight_bit: int | None = None
    quant_act: bool | None = None
    act_bit: int | None = None
    sm_abit: int | None = None
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
        if self.quant_mode is not None:
            _check_choice("quant_mode", self.quant_mode, QUANT_MODES)
        if self.engine is not None:
            _check_choice("engine", self.engine, (*ENGINES, CALIBRATION_ENGINE))

    @property
    def names_settings(self) -> bool:
        """True if any of the settings is given that `quant_act` was read together with in the original work."""
        named = (self.weight_bit, self.act_bit, self.sm_abit, self.split, self.quant_mode)
        return any(value is not None for value in named)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")
