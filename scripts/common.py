"""What the commands share: flags, errors, logs, the choice and building of the model, drawing, and writing files."""

import argparse
import functools
import hashlib
import logging
import logging.handlers
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

import tomesd
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import check_steps, seeded_generators
from ldm.util import load_model_from_config

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

TOME_FLAGS = ("max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
QUANTIZATION_FLAGS = (
    "ptq",
    "quant_act",
    "weight_bit",
    "act_bit",
    "quant_mode",
    "cali_ckpt",
    "cond",
    "no_grad_ckpt",
    "split",
    "sm_abit",
)

PACKAGES = ("dsdiff", "ldm", "tomesd", "qdiff")  # whose log lines are shown
logger = logging.getLogger("dsdiff")


# --- errors ------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Tells bad flags in one line, and wants flags written in full."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def command(main: Callable[[list[str]], None]) -> Callable[[Sequence[str] | None], None]:
    """Make `main(argv)` a command: what goes wrong becomes one line on stderr and an exit status.

    2 for bad input (with --verbose after the traceback), 130 for Ctrl-C; its line holds what a KeyboardInterrupt says.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else list(argv)
        try:
            main(argv)
        except KeyboardInterrupt as interrupt:
            _leave(130, f"interrupted: {interrupt}" if str(interrupt) else "interrupted")
        except (ValueError, OSError, NotImplementedError, MemoryError, RuntimeError) as error:
            message = _describe(error)
            if message is None:
                raise
            if "--verbose" in argv:
                traceback.print_exc()
            _leave(2, f"error: {message}")

    return guarded


def _leave(status: int, line: str) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status) from None


def _describe(error: Exception) -> str | None:
    """What to say about bad input; None for an error that is a defect of the program."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {str(error.filename)!r}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory: use a smaller --n_samples, --H or --W"
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return None
    return str(error) or type(error).__name__


# --- logs --------------------------------------------------------------------------------------------------


class Log:
    """The log file of a run: lines wait in memory until `open`, so that a run that never begins leaves no file."""

    def __init__(self) -> None:
        self.handler: logging.Handler = logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL + 1)

    def open(self, path: Path) -> None:
        """Append all lines so far, and those to come, to the file `path`."""
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        waiting, self.handler = self.handler, file
        logging.getLogger().addHandler(file)
        logging.getLogger().removeHandler(waiting)
        waiting.setTarget(file)
        waiting.close()


class _Console(logging.Handler):
    """Writes to stdout, past the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stdout)


@contextmanager
def logs(verbose: bool) -> Iterator[Log]:
    """While open, our packages' lines go to stdout (with `verbose` the detailed ones too) and to the log's file."""
    root, log = logging.getLogger(), Log()
    console = _Console(logging.DEBUG if verbose else logging.INFO)
    root.addHandler(console)
    root.addHandler(log.handler)
    levels = {name: logging.getLogger(name).level for name in PACKAGES}
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        yield log
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in (console, log.handler):
            root.removeHandler(handler)
            handler.close()


# --- flags -------------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` (int or float) in low..high."""
    what = "a whole number" if kind is int else "a number"
    limits = f"of {low} or more" if high == math.inf else f"in {low}..{high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")
        return value

    return parse


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the model's yaml (default: Stable Diffusion v1's if its checkpoint is there or --ckpt is given, "
        "else the embedded model's)",
    )
    group.add_argument("--ckpt", metavar="FILE", help=".ckpt or .safetensors (default: the config's, under models/ldm)")
    group.add_argument("--tokenizer", metavar="DIR", help="the tokenizer's files (default: beside the checkpoint)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=["autocast", "full"],
        help="of the UNet: autocast is bfloat16, or float16 on a GPU without it; full is float32 "
        "(default: autocast on a GPU, full on the CPU)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    sampler = group.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="sample with PLMS (default: DDIM)")
    sampler.add_argument("--dpm_solver", action="store_true", help="sample with DPM-Solver++ (2M)")
    group.add_argument(
        "--ddim_steps", type=number(int, 1), metavar="N", help="steps, of whatever sampler (default: the model's)"
    )
    group.add_argument(
        "--ddim_eta",
        type=number(float, 0, 1),
        metavar="X",
        help="DDIM's noise in each step, 0..1 (default: 0, which is deterministic)",
    )
    group.add_argument(
        "--scale",
        type=number(float, 0),
        metavar="X",
        help="guidance, eps = eps_u + scale * (eps_c - eps_u); 1 is none (default: the model's)",
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="what guidance leads away from (default: '')")
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=42,
        metavar="N",
        help="picture i starts from the noise of seed + i (default: %(default)s)",
    )
    group.add_argument(
        "--n_samples", type=number(int, 1), default=3, metavar="N", help="pictures per batch (default: %(default)s)"
    )
    group.add_argument("--H", type=number(int, 1), metavar="PIXELS", help="height (default: the model's)")
    group.add_argument("--W", type=number(int, 1), metavar="PIXELS", help="width (default: the model's)")
    group.add_argument("--C", type=number(int, 1), metavar="N", help="channels of the latents; must be the model's")
    group.add_argument("--f", type=number(int, 1), metavar="N", help="pixels per latent; must be the model's")


def add_tome_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("token merging (all but --ratio only with a --ratio above 0)")
    group.add_argument(
        "--ratio",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="part of the tokens to merge, up to 1 - 1/(sx*sy); 0 merges none, 0.5 is wise (default: %(default)s)",
    )
    group.add_argument(
        "--max_downsample",
        type=int,
        choices=[1, 2, 4, 8],
        help="merge in blocks at 1/N of the latents' size or larger (default: 1)",
    )
    group.add_argument("--sx", type=number(int, 1), metavar="N", help="width of a tile (default: 2)")
    group.add_argument("--sy", type=number(int, 1), metavar="N", help="height of a tile (default: 2)")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--use_rand", action=switch, help="draw the token that a tile keeps (default: yes)")
    group.add_argument("--merge_attn", action=switch, help="merge around self-attention (default: yes)")
    group.add_argument("--merge_crossattn", action=switch, help="merge around cross-attention (default: no)")
    group.add_argument("--merge_mlp", action=switch, help="merge around the feed-forward layers (default: no)")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization (not available in this version)")
    for name in QUANTIZATION_FLAGS:
        if name in ("weight_bit", "act_bit", "sm_abit"):
            group.add_argument(f"--{name}", type=number(int, 1), metavar="BITS")
        elif name in ("quant_mode", "cali_ckpt"):
            group.add_argument(f"--{name}", metavar={"quant_mode": "MODE", "cali_ckpt": "FILE"}[name])
        else:
            group.add_argument(f"--{name}", action="store_true", default=None)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The flags among `names` that stand on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def refuse_quantization(args: argparse.Namespace) -> None:
    """Raise ValueError if a flag of the quantization group is given."""
    given = _given(args, QUANTIZATION_FLAGS)
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"quantization is not available in this version: leave out {flags}")


def merge_options(args: argparse.Namespace) -> tomesd.MergeOptions | None:
    """What --ratio and its group ask for; None for no merging. ValueError for what is out of range or idle."""
    given = _given(args, TOME_FLAGS)
    if args.ratio > 0:
        return tomesd.MergeOptions(ratio=args.ratio, **given)
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"without --ratio nothing is merged, so {flags} has no effect: add --ratio 0.5, say")
    return None


# --- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model before its weights are read: its files, what it was trained for, and its sizes.

    description: what it is, in words. height, width: pixels. steps, scale: of sampling. channels: of the latents.
    factor: pixels per latent. timesteps: of the noise process.
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

    def __str__(self) -> str:
        return f"{self.description} ({self.ckpt})"

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weights' file and of the config's model part."""
        with open(self.ckpt, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        architecture = yaml.safe_dump(self.config["model"]).encode()
        return {"ckpt_sha256": weights, "config_sha256": hashlib.sha256(architecture).hexdigest()}


def choose_model(args: argparse.Namespace) -> ModelChoice:
    """The model that --config and --ckpt mean. Reads the config, and of the checkpoint no more than that it exists.

    Raises FileNotFoundError or ValueError for files that are missing or no model's.
    """
    config_path, ckpt = _choose_files(args.config, args.ckpt)
    if not ckpt.exists():
        raise FileNotFoundError(f"no checkpoint at {str(ckpt)!r}: give its path with --ckpt")
    if not ckpt.is_file():
        raise ValueError(f"{str(ckpt)!r} is not a file: give the path of a checkpoint with --ckpt")
    config = _read_config(config_path)
    return ModelChoice(config_path=config_path, config=config, ckpt=ckpt, **_model_facts(config, config_path))


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


def _read_config(path: Path) -> dict[str, Any]:
    """A config as plain dicts, a relative tokenizer directory found wherever the command runs."""
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


def build_model(args: argparse.Namespace, choice: ModelChoice) -> nn.Module:
    """The chosen LatentDiffusion on its device, ready to draw. Token merging comes last, after all else."""
    refuse_quantization(args)
    device = choose_device(args.device)
    merge = merge_options(args)
    model = load_model_from_config(
        choice.config, choice.ckpt, device, tokenizer=args.tokenizer, verbose=getattr(args, "verbose", False)
    )
    getattr(model.cond_stage_model, "tokenizer", None)  # read now, since what it lacks should be told before all else
    if merge is not None:
        tomesd.apply_patch(model, **asdict(merge))
    return model


# --- drawing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are drawn, all defaults resolved.

    height, width: pixels. sampler: a key of SAMPLERS. eta in [0, 1], of DDIM. precision: autocast or full.
    merge: what the model's tokens are merged by, None without.
    """

    height: int
    width: int
    sampler: str
    steps: int
    eta: float
    scale: float
    negative_prompt: str
    precision: str
    merge: tomesd.MergeOptions | None


def sampling_options(args: argparse.Namespace, choice: ModelChoice) -> SamplingOptions:
    """What the flags say, and where they say nothing what the model was trained for.

    Raises ValueError for a value that the model cannot have and for flags that would have no effect.
    """
    sampler = "plms" if args.plms else "dpm_solver" if args.dpm_solver else "ddim"
    if args.ddim_eta is not None and sampler != "ddim":
        raise ValueError(f"--ddim_eta {args.ddim_eta:g} has no effect with --{sampler}, which is deterministic")
    for flag, model_has in (("C", choice.channels), ("f", choice.factor)):
        given = getattr(args, flag)
        if given not in (None, model_has):
            raise ValueError(f"--{flag} {given} contradicts the model, which has {model_has}: leave it out")
    scale = choice.scale if args.scale is None else args.scale
    if args.negative_prompt is not None and scale == 1:
        raise ValueError("--negative_prompt has no effect with --scale 1, which is no guidance: use a larger scale")
    steps = args.ddim_steps or choice.steps
    check_steps(steps, choice.timesteps)
    on_gpu = choose_device(args.device).type == "cuda"
    return SamplingOptions(
        height=_side("H", args.H or choice.height, choice.factor),
        width=_side("W", args.W or choice.width, choice.factor),
        sampler=sampler,
        steps=steps,
        eta=args.ddim_eta or 0.0,
        scale=float(scale),
        negative_prompt=args.negative_prompt or "",
        precision=args.precision or ("autocast" if on_gpu else "full"),
        merge=merge_options(args),
    )


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


# --- files -------------------------------------------------------------------------------------------------


def to_pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images [B, 3, H, W] in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def check_writable(directory: Path) -> None:
    """Raise OSError or ValueError if `directory` cannot be made, or nothing can be written to it. Leaves no trace."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write to {str(directory)!r}: {str(existing)!r} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {str(directory)!r}: {error.strerror}; choose another --outdir") from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, then rename to `path`: the file is there complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with the given text chunks."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    write_file(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))
