"""The choice and building of the model, and drawing with it."""

import argparse
import functools
import hashlib
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

import tomesd
from dsdiff.cli.console import logger
from dsdiff.cli.flags import given_flags, merge_options
from dsdiff.models.bundle import for_drawing, load_packed, packed_config
from dsdiff.models.quantized import Quantization, choose_quantization, install, quantize
from ldm.fileio import file_sha256
from ldm.half_storage import give_back_freed
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import check_steps, make_ddim_timesteps, seeded_generators
from ldm.util import load_model_from_config
from qdiff.engine.backends.onednn import has_bfloat16
from qdiff.engine.lower import fits_bytes

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}

# Config -> where its checkpoint may lie. Without --config and --ckpt the first of these files that exists is taken.
STABLE_DIFFUSION = ROOT / "configs/stable-diffusion/v1-inference.yaml"
EMBEDDED = ROOT / "configs/shapes/txt2img.yaml"
CHECKPOINTS = {
    STABLE_DIFFUSION: (
        ROOT / "models/ldm/stable-diffusion-v1/model.ckpt",
        ROOT / "models/ldm/stable-diffusion-v1/model.safetensors",
    ),
    EMBEDDED: (ROOT / "models/ldm/shapes/model.safetensors",),
}
# The cali_ckpts that come with a checkpoint, by the bits of its weights.
CALI_CKPTS = {
    CHECKPOINTS[EMBEDDED][0]: {bits: ROOT / f"models/ldm/shapes/cali_w{bits}a8.safetensors" for bits in (4, 8)},
}


# --- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model before its weights are read: its files, what it was trained for, and its sizes.

    description: what it is, in words. height, width: pixels. steps, scale: of sampling. channels: of the latents.
    factor: pixels per latent. timesteps: of the noise process.
    packed: whether it is a file of scripts/export.py, quantized and with its config in it.
    """

    config_path: Path
    config: Mapping[str, Any]
    ckpt: Path
    description: str
    height: int
    width: int
    steps: int
    scale: float
    channels: int
    factor: int
    timesteps: int
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.description} ({self.ckpt})"

    @property
    def cali_ckpts(self) -> Mapping[int, Path]:
        """The cali_ckpts that come with the checkpoint, by the bits of its weights."""
        return CALI_CKPTS.get(self.ckpt.resolve(), {})

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights' file, and of what drawing needs of the config, wherever its tokenizer lies."""
        architecture = yaml.safe_dump(for_drawing(self.config)).encode()
        return {"ckpt_sha256": file_sha256(self.ckpt), "config_sha256": hashlib.sha256(architecture).hexdigest()}


def choose_model(args: argparse.Namespace) -> ModelChoice:
    """The model that --config and --ckpt mean. Reads the config, and of the checkpoint no more than that it exists.

    Raises FileNotFoundError or ValueError for files that are missing or no model's.
    """
    packed = _packed_config(args)
    if packed is not None:
        ckpt = Path(args.ckpt)
        return ModelChoice(config_path=ckpt, config=packed, ckpt=ckpt, packed=True, **_model_facts(packed, ckpt))
    config_path, ckpt = _choose_files(args.config, args.ckpt)
    if not ckpt.exists():
        raise FileNotFoundError(f"no checkpoint at {str(ckpt)!r}: give its path with --ckpt")
    if not ckpt.is_file():
        raise ValueError(f"{str(ckpt)!r} is not a file: give the path of a checkpoint with --ckpt")
    config = read_config(config_path)
    return ModelChoice(config_path=config_path, config=config, ckpt=ckpt, **_model_facts(config, config_path))


def _packed_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """The config in --ckpt, if it is a file of scripts/export.py. ValueError for flags that contradict that."""
    if args.ckpt is None or not Path(args.ckpt).is_file() or (config := packed_config(Path(args.ckpt))) is None:
        return None
    if not hasattr(args, "ptq"):
        raise ValueError(f"{args.ckpt!r} holds a quantized model: this command needs the float one's checkpoint")
    for flag in ("config", "tokenizer"):
        if getattr(args, flag, None) is not None:
            raise ValueError(f"--{flag} has no effect: {args.ckpt!r} brings its own; leave it out")
    return config


def _choose_files(config: str | None, ckpt: str | None) -> tuple[Path, Path]:
    if config is None and ckpt is None:
        known = [(path, file) for path, files in CHECKPOINTS.items() for file in files]
        found = next((pair for pair in known if pair[1].is_file()), None)
        if found is None:
            places = " and ".join(str(file) for _, file in known)
            raise FileNotFoundError(f"no checkpoint at {places}: put one there or give --config and --ckpt")
        return found
    if config is None:
        path = Path(ckpt).resolve()
        return next((name for name, files in CHECKPOINTS.items() if path in files), STABLE_DIFFUSION), Path(ckpt)
    if ckpt is None:
        files = CHECKPOINTS.get(Path(config).resolve())
        if files is None:
            raise ValueError(f"--config {config} comes with no checkpoint: give one with --ckpt")
        return Path(config), next((file for file in files if file.is_file()), files[0])
    return Path(config), Path(ckpt)


def read_config(path: Path) -> dict[str, Any]:
    """A config as plain dicts, a relative tokenizer directory found wherever the command runs.

    Raises OSError if it cannot be read, ValueError if it is no yaml.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"config {str(path)!r} is no valid yaml: {error}") from error
    encoder = _look_up(config, "model.params.cond_stage_config.params")
    if isinstance(encoder, dict) and encoder.get("tokenizer"):
        directory = encoder.pop("tokenizer")
        found = [place / directory for place in (Path.cwd(), ROOT) if (place / directory).is_dir()]
        if found:  # otherwise it may lie beside the checkpoint
            encoder["tokenizer"] = str(found[0])
    return config


def _look_up(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _model_facts(config: Any, path: Path) -> dict[str, Any]:
    """The sizes of a config's model, and its defaults for sampling."""
    image_size = _look_up(config, "model.params.image_size")
    ch_mult = _look_up(config, "model.params.first_stage_config.params.ddconfig.ch_mult")
    sizes = {
        "channels": _look_up(config, "model.params.channels"),
        "timesteps": _look_up(config, "model.params.timesteps") or 1000,
        "factor": 2 ** (len(ch_mult) - 1) if isinstance(ch_mult, list) else None,
    }
    if not all(isinstance(size, int) and size > 0 for size in (image_size, *sizes.values())):
        raise ValueError(
            f"config {str(path)!r} describes no latent diffusion model: it needs model.params with image_size, "
            "channels and first_stage_config.params.ddconfig.ch_mult"
        )
    side = image_size * sizes["factor"]
    defaults = {"description": path.stem, "height": side, "width": side, "steps": 50, "scale": 7.5}
    sampling = config.get("sampling", {})
    if not isinstance(sampling, dict) or not sampling.keys() <= defaults.keys():
        raise ValueError(f"config {str(path)!r}: sampling may hold {', '.join(defaults)}, and holds {sampling}")
    for name, value in sampling.items():
        if not isinstance(value, int | float if name == "scale" else type(defaults[name])):
            raise ValueError(f"config {str(path)!r}: sampling.{name} cannot be {value!r}")
    return sizes | defaults | sampling


def choose_device(name: str) -> torch.device:
    """auto (a GPU if there is one), cpu, cuda or cuda:N; ValueError for anything else, and for a GPU that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, index = name.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdecimal())):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ValueError(f"device {name!r} is not there ({count} CUDA devices): use another one or --device cpu")
    return torch.device(name)


def build_model(args: argparse.Namespace, choice: ModelChoice, options: "SamplingOptions") -> nn.Module:
    """The chosen LatentDiffusion on its device, ready to draw: quantized, then with its tokens merged, as asked."""
    device, quantization = choose_device(args.device), options.quantization
    if choice.packed:
        model, qnn = load_packed(choice.ckpt, device)
        install(model, qnn, quantization, options.precision)
        give_back_freed()
        return _merged(model, options)
    model = load_model_from_config(
        choice.config, choice.ckpt, device, tokenizer=args.tokenizer, verbose=getattr(args, "verbose", False)
    )
    getattr(model.cond_stage_model, "tokenizer", None)  # read now, since what it lacks should be told before all else
    if quantization is not None:
        quantize(model, quantization, options.precision)
    return _merged(model, options)


def _merged(model: nn.Module, options: "SamplingOptions") -> nn.Module:
    if options.merge is not None:
        tomesd.apply_patch(model, **asdict(options.merge))
    return model


# --- drawing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are drawn, all defaults resolved.

    height, width: pixels. sampler: a key of SAMPLERS. steps: asked for; steps_taken: those that this gives (see
    `make_ddim_timesteps`). eta in [0, 1], of DDIM. precision: autocast or full. merge, quantization: how the model's
    tokens are merged and its numbers quantized, None without.
    """

    height: int
    width: int
    sampler: str
    steps: int
    steps_taken: int
    eta: float
    scale: float
    negative_prompt: str
    precision: str
    merge: tomesd.MergeOptions | None
    quantization: Quantization | None = None


def sampling_options(args: argparse.Namespace, choice: ModelChoice) -> SamplingOptions:
    """What the flags say, and where they say nothing what the model was trained for. Those of the size may be absent.

    Raises ValueError for a value that the model cannot have and for flags that would have no effect.
    """
    sampler = "plms" if args.plms else "dpm_solver" if args.dpm_solver else "ddim"
    if args.ddim_eta is not None and sampler != "ddim":
        raise ValueError(f"--ddim_eta {args.ddim_eta:g} has no effect with --{sampler}, which is deterministic")
    size = given_flags(args, ("H", "W", "C", "f"))
    for flag, model_has in (("C", choice.channels), ("f", choice.factor)):
        if size.get(flag, model_has) != model_has:
            raise ValueError(f"--{flag} {size[flag]} contradicts the model, which has {model_has}: leave it out")
    scale = choice.scale if args.scale is None else args.scale
    if args.negative_prompt is not None and scale == 1:
        raise ValueError("--negative_prompt has no effect with --scale 1, which is no guidance: use a larger scale")
    steps = args.ddim_steps or choice.steps
    taken = _steps_taken(sampler, steps, choice.timesteps)
    if taken != steps:
        logger.info("%d steps do not divide the model's %d: %d are taken", steps, choice.timesteps, taken)
    device = choose_device(args.device)
    packed = choice.ckpt if choice.packed else None
    quantization = choose_quantization(args, choice.cali_ckpts, device, packed)
    return SamplingOptions(
        height=_side("H", size.get("H", choice.height), choice.factor),
        width=_side("W", size.get("W", choice.width), choice.factor),
        sampler=sampler,
        steps=steps,
        steps_taken=taken,
        eta=args.ddim_eta or 0.0,
        scale=float(scale),
        negative_prompt=args.negative_prompt or "",
        precision=args.precision or default_precision(device, quantization),
        merge=merge_options(args),
        quantization=quantization,
    )


def default_precision(device: torch.device, quantization: Quantization | None) -> str:
    """autocast on a GPU, and for integers, simulated ones too, on a CPU that computes in bfloat16; else full."""
    integers = quantization is not None and fits_bytes(quantization.effective)
    return "autocast" if device.type == "cuda" or (integers and has_bfloat16()) else "full"


def _steps_taken(sampler: str, steps: int, timesteps: int) -> int:
    check_steps(steps, timesteps)
    return steps if sampler == "dpm_solver" else len(make_ddim_timesteps("uniform", steps, timesteps))


def _side(flag: str, pixels: int, factor: int) -> int:
    if pixels % factor:
        below, above = pixels // factor * factor, (pixels // factor + 1) * factor
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(f"--{flag} {pixels} is not a multiple of {factor}: use {nearest}")
    return pixels


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    verbose: bool = False,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] for `decode`, one a prompt, each from the noise of its own seed.

    A picture depends on its prompt, its seed and the options alone; that of another batch differs by rounding. (Only
    token merging with scale 1 treats even and odd batches differently.) verbose: a progress bar. callback(i) is called
    after step i.
    """
    factor = model.first_stage_model.factor
    if options.merge is not None:  # the same destinations for all batches, whatever was drawn before
        tomesd.reseed(model, options.merge.seed)
    context = model.get_learned_conditioning(list(prompts))
    unconditional = None
    if options.scale != 1:
        unconditional = model.get_learned_conditioning([options.negative_prompt] * len(prompts))
    with precision_context(model.device, options.precision):
        latents, _ = SAMPLERS[options.sampler](model).sample(
            options.steps,
            len(prompts),
            (model.channels, options.height // factor, options.width // factor),
            context,
            eta=options.eta,
            unconditional_guidance_scale=options.scale,
            unconditional_conditioning=unconditional,
            generator=seeded_generators(seeds),
            verbose=verbose,
            callback=callback,
        )
    return latents


@torch.no_grad()
def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], float32 in [0, 1] on the CPU, of latents [B, C, h, w].

    One at a time, which needs little memory, and in float32: bfloat16 is coarser than the 256 levels of a picture.
    """
    with precision_context(model.device, "full"):
        images = [model.decode_first_stage(latent[None].float()).cpu() for latent in latents]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def precision_context(device: torch.device, precision: str) -> AbstractContextManager:
    """autocast: bfloat16, or float16 on a GPU that has none. full: float32, not rounded to TF32 on the way."""
    if precision == "full":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if has_bfloat16 else torch.float16)


# --- what drew it ------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of the project, Python and the packages on which pictures depend."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return {project["name"]: project["version"], "python": platform.python_version(), **packages}
