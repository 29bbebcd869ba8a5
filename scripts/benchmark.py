#!/usr/bin/env python
"""How fast is the UNet, how much memory does it take? python scripts/benchmark.py --repeats 5

Times single UNet calls as a guided step makes them (a batch of 2) at the model's latent size, in float32 and under
autocast, each with every --ratio of merged tokens. All settings are gone through in turn, --repeats times, forwards
and backwards; each measurement begins with an untimed call. What is compared is compared within a repeat: speed-up is
the time of float32 without merging over the setting's, both of the same repeat. Tables show medians (min..max).

Speed does not depend on what the weights are: --random_weights measures the real shapes of Stable Diffusion v1, or of
any --config, without a checkpoint. Prints a table and writes OUTDIR/benchmark.json.
"""

# ruff: noqa: E402
import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

import tomesd
from ldm.checkpoint import averaged_weights, fill, read_weights
from ldm.util import instantiate_from_config
from qdiff.files import write_atomically
from scripts.common import CHECKPOINTS, EMBEDDED, STABLE_DIFFUSION, choose_device, precision_context, read_config
from scripts.console import ArgumentParser, command, number
from scripts.files import check_writable

MODELS = {"embedded": EMBEDDED, "sd-v1": STABLE_DIFFUSION}  # name -> config
UNET_PREFIX = "model.diffusion_model."
CLIP_TOKENS = 77  # of a prompt, unless the config says otherwise
MIN_SECONDS = 0.5  # a measurement is the mean of as many calls as fit, and of one at least


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured. precision: as precision_context has it; ratio: part of the tokens to merge, 0 is none."""

    precision: str
    ratio: float


BASELINE = Setting(precision="full", ratio=0.0)


@dataclass(kw_only=True)
class Measured:
    """A setting's figures. seconds: per call, one a repeat.

    tokens: share that the transformer blocks process of those they get. peak_bytes: the most memory that was held while
    this setting ran, by torch on a GPU, else by the whole process with its libraries; None where the system does not
    tell.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: float = 1.0
    peak_bytes: int | None = None


# ---------------------------------------------------------------------------------------- the command line


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=list(MODELS), help="(default: embedded)")
    which.add_argument("--config", type=Path, metavar="FILE", help="any model's yaml; needs --random_weights")
    add = parser.add_argument
    add("--random_weights", action="store_true", help="build the config's UNet without a checkpoint")
    add("--ratio", type=number(float, 0, 1), nargs="+", default=[0.0, 0.3, 0.5], metavar="X", help="(default: 0 .3 .5)")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=number(int, 1), metavar="N", help="of the CPU (default: torch's choice)")
    add("--channels_last", action="store_true", help="keep convolutions in the memory format NHWC")
    add("--outdir", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(default: %(default)s)")
    add("--verbose", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.config is not None and not args.random_weights:
        parser.error("--config FILE comes without a checkpoint: add --random_weights")
    if args.config is None and args.random_weights and args.model != "sd-v1":
        parser.error("--random_weights contradicts the embedded model, which has weights: leave it out")
    return args


def settings_of(ratios: Sequence[float]) -> list[Setting]:
    """The baseline, then all others. ValueError for a ratio that cannot be merged."""
    for ratio in ratios:
        tomesd.MergeOptions(ratio=ratio)
    wanted = [Setting(precision=precision, ratio=ratio) for precision in ("full", "autocast") for ratio in ratios]
    return list(dict.fromkeys([BASELINE, *wanted]))


# ------------------------------------------------------------------------------------------------ the UNet


def read_params(path: Path) -> dict[str, Any]:
    """The `model.params` of a config. Raises OSError or ValueError if they cannot be read or describe no UNet."""
    config = read_config(path)
    try:
        params = config["model"]["params"]
        if all(params[key] for key in ("image_size", "channels")) and params["unet_config"]["params"]["context_dim"]:
            return params
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"config {str(path)!r} describes no latent diffusion model with text: it needs model.params with image_size, "
        "channels and unet_config, and in that params.context_dim"
    )


def random_unet(config: dict[str, Any]) -> nn.Module:
    """A UNet with the weights that training begins with, noise in place of the zeros, which would end all signals."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = instantiate_from_config(config)
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return unet


def trained_unet(config: dict[str, Any], *places: Path) -> nn.Module:
    """The UNet alone, in float32, of the first checkpoint that is there. Errors are those of ldm.checkpoint."""
    ckpt = next((path for path in places if path.is_file()), None)
    if ckpt is None:
        missing = " or ".join(repr(str(path)) for path in places)
        raise FileNotFoundError(f"no checkpoint at {missing}: put one there, or use --model sd-v1 --random_weights")
    tensors = read_weights(ckpt)
    tensors |= averaged_weights(tensors, str(ckpt))
    with torch.device("meta"):
        unet = instantiate_from_config(config)
    own = {name.removeprefix(UNET_PREFIX): tensors[name] for name in tensors if name.startswith(UNET_PREFIX)}
    fill(unet, own, str(ckpt))
    return unet.float()


def inputs_of(params: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Noise as arguments of a UNet call: latents [2, C, h, w], timesteps [2], context [2, tokens, context_dim]."""
    generator = torch.Generator().manual_seed(0)
    side = params["image_size"]
    encoder = (params.get("cond_stage_config") or {}).get("params") or {}
    width = params["unet_config"]["params"]["context_dim"]
    inputs = {
        "x": torch.randn(2, params["channels"], side, side, generator=generator),
        "timesteps": torch.full((2,), 500),
        "context": torch.randn(2, encoder.get("max_length", CLIP_TOKENS), width, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# --------------------------------------------------------------------------------------------- measurement


@contextmanager
def applied(setting: Setting, unet: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, `unet` works as the setting says; afterwards it is as before.

    It is one context for all calls of a measurement, as for all steps of a picture: autocast keeps its converted
    weights while it lasts.
    """
    if setting.ratio:
        tomesd.apply_patch(unet, ratio=setting.ratio)
    try:
        with torch.no_grad(), precision_context(device, setting.precision):
            yield
    finally:
        tomesd.remove_patch(unet)


def seconds_per_call(call: Callable[[], Any], device: torch.device) -> float:
    """Mean over at least MIN_SECONDS, after one untimed call."""

    def finished_call() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished_call()
    start, calls, seconds = time.perf_counter(), 0, 0.0
    while not calls or seconds < MIN_SECONDS:
        finished_call()
        calls, seconds = calls + 1, time.perf_counter() - start
    return seconds / calls


def reset_peak(device: torch.device) -> bool:
    """Let peak_bytes count from here on; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 is the high-water mark of resident memory (Linux)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def measure(
    unet: nn.Module, inputs: dict[str, Tensor], settings: Sequence[Setting], repeats: int, device: torch.device
) -> dict[Setting, Measured]:
    """All settings in turn, every second time backwards, so that a slow drift of the machine favours none."""
    found = {setting: Measured() for setting in settings}
    rounds = [setting for i in range(repeats) for setting in (settings if i % 2 == 0 else settings[::-1])]
    for setting in tqdm(rounds, unit="measurement"):
        of = found[setting]
        has_peak = reset_peak(device)
        with applied(setting, unet, device):
            of.seconds.append(seconds_per_call(lambda: unet(**inputs), device))
            if setting.ratio:
                counts = tomesd.token_report(unet)
                of.tokens = sum(count.tokens_processed for count in counts) / sum(count.tokens_in for count in counts)
        if has_peak:
            of.peak_bytes = max(of.peak_bytes or 0, peak_bytes(device))
    return found


# -------------------------------------------------------------------------------------------------- report


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows_of(found: dict[Setting, Measured]) -> list[dict[str, Any]]:
    """A row a setting, with the spread of its times and of its speed-up over the baseline, repeat by repeat."""
    base = found[BASELINE].seconds
    return [
        {
            **asdict(setting),
            "tokens": of.tokens,
            "seconds": spread(of.seconds),
            "speedup": spread([b / s for b, s in zip(base, of.seconds, strict=True)]),
            "peak_bytes": of.peak_bytes,
            "seconds_by_repeat": of.seconds,
        }
        for setting, of in found.items()
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """What kind of machine this is; nothing that tells one from another of its kind."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = {
        "cpu": cpu_model(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
    }
    return kind | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def model_facts(unet: nn.Module, inputs: dict[str, Tensor], path: Path, random_weights: bool) -> dict[str, Any]:
    return {
        "config": path.name,
        "random_weights": random_weights,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in unet.parameters()),
        "latents": list(inputs["x"].shape),
        "context": list(inputs["context"].shape),
    }


def table(report: dict[str, Any]) -> str:
    """Two lines on model and machine, then a line a setting."""
    model, on = report["model"], report["machine"]
    weights = "random weights" if model["random_weights"] else "weights"
    lines = [
        f"{model['config']}: UNet of {model['parameters'] / 1e6:.1f} M parameters, {weights} of "
        f"{model['weight_bytes'] / 1e6:.1f} MB, latents {model['latents']}",
        f"{on.get('gpu', on['cpu'])}, {on['cores']} cores, {on['threads']} threads, torch {on['torch']}; "
        f"autocast to {report['autocast']}; median (min..max) of {report['repeats']} repeats",
        f"{'precision':<10}{'ratio':>6}{'tokens':>8}{'seconds per call':>28}{'speed-up':>24}{'peak MB':>10}",
    ]
    for row in report["settings"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        cells = f"{row['precision']:<10}{row['ratio']:>6g}{row['tokens']:>8.0%}"
        lines.append(f"{cells}{_shown(row['seconds'], 4):>28}{_shown(row['speedup'], 3):>24}{peak:>10}")
    return "\n".join(lines)


def _shown(of: dict[str, float], digits: int) -> str:
    median, low, high = (f"{of[name]:.{digits}g}" for name in ("median", "min", "max"))
    return f"{median} ({low}..{high})"


# ------------------------------------------------------------------------------------------------- the run


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The report, as it is written."""
    device = choose_device(args.device)
    if args.threads is not None:
        if device.type == "cuda":
            raise ValueError(f"--threads {args.threads} has no effect on a GPU: leave it out or use --device cpu")
        torch.set_num_threads(args.threads)
    settings = settings_of(args.ratio)
    path = args.config or MODELS[args.model or "embedded"]
    params = read_params(path)
    config = params["unet_config"]
    unet = random_unet(config) if args.random_weights else trained_unet(config, *CHECKPOINTS[path])
    unet = unet.to(device).eval()
    inputs = inputs_of(params, device)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    found = measure(unet, inputs, settings, args.repeats, device)
    with precision_context(device, "autocast"):
        autocast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    return {
        "model": model_facts(unet, inputs, path, args.random_weights),
        "machine": machine(device),
        "autocast": autocast,
        "channels_last": args.channels_last,
        "repeats": args.repeats,
        "settings": rows_of(found),
    }


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    check_writable(args.outdir)
    report = benchmark(args)
    tqdm.write(table(report))
    args.outdir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report, indent=2)
    write_atomically(args.outdir / "benchmark.json", lambda path: path.write_text(content + "\n"))


if __name__ == "__main__":
    main()
