"""Look at an installation: versions, what the CPU can do, which models are there, and which jobs there is room for."""

import importlib.util
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dsdiff.calibration.estimate import available_memory
from dsdiff.environment import machine, versions
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED, STABLE_DIFFUSION, TINY_DECODERS, TOKENIZER
from qdiff.engine import cpu, native
from qdiff.engine.backends.onednn import LARGEST, LARGEST_IN_16_BITS, largest_exact_weight

GB = 1e9
# Optional extra -> the packages that tell that it is installed, and the commands that need it.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "train": (("pytorch_lightning", "torchvision"), "train.py"),
    "eval": (("torch_fidelity", "torchmetrics", "matplotlib"), "eval_*.py, reproduce.py and plots of benchmark.py"),
    "web": (("fastapi", "gradio", "uvicorn"), "serve.py"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of Stable Diffusion v1's size, and its needs in bytes, as docs/usage.md tells them.

    way_out: what needs less.
    """

    name: str
    memory: float
    disk: float
    way_out: str


JOBS = (
    Job(name="draw 512x512, W4A8 in one file", memory=1.9 * GB, disk=0.85 * GB, way_out="--low_memory, smaller --H"),
    Job(name="the same with --low_memory", memory=1.6 * GB, disk=0.85 * GB, way_out="a smaller --H and --W"),
    Job(name="draw 512x512, checkpoint in float16", memory=7.0 * GB, disk=2.1 * GB, way_out="a file of export.py"),
    Job(name="calibrate W4A8, as in docs/usage.md", memory=13 * GB, disk=1.0 * GB, way_out="fewer --samples_w"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fact about the installation. advice: what to do about it; None where all is well."""

    topic: str
    text: str
    advice: str | None = None


def examine(outdir: Path) -> list[Finding]:
    """Return all findings. outdir: where results would be written; it need not exist."""
    parts = (_versions, _cpu, _kernels, _gpu, _models)
    return [finding for part in parts for finding in part()] + list(_room(outdir))


# --- software and processors -------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding(topic="versions", text=", ".join(f"{name} {version}" for name, version in versions().items()))
    for extra, (packages, commands) in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        advice = f'for {commands}: pip install ".[{extra}]"' if missing else None
        text = f"{extra}: {'lacks ' + ', '.join(missing) if missing else 'installed'}"
        yield Finding(topic="extras", text=text, advice=advice)


def _cpu() -> Iterator[Finding]:
    facts = machine(torch.device("cpu"))
    capped = f", capped at {cpu.cap()}" if cpu.cap() is not None else ""
    idle = "some cores are left idle: unset OMP_NUM_THREADS, unless another job needs them"
    yield Finding(
        topic="CPU",
        text=f"{facts['cpu']}; cores: {facts['cores']}, threads: {facts['threads']}",
        advice=idle if facts["threads"] < facts["cores"] else None,
    )
    yield Finding(
        topic="CPU",
        text=f"instruction set {cpu.isa() or 'below AVX2'}{capped}",
        advice=None if cpu.isa() else "the integer engine is slow on this CPU: draw in float, with --ratio",
    )
    precision = "bfloat16" if cpu.has_bfloat16() else "float32, as the CPU has no bfloat16"
    yield Finding(topic="CPU", text=f"what is not in integers is computed in {precision}")
    exact = largest_exact_weight()
    products = {
        0: "not by oneDNN: all models are simulated by PyTorch, slowly",
        LARGEST_IN_16_BITS: "exact for weights of 6 bits or less; models with weights of 8 bits are simulated, slowly",
        LARGEST: "exact for weights of 8 bits or less",
    }
    yield Finding(topic="CPU", text=f"integer products {products[exact]}")


def _kernels() -> Iterator[Finding]:
    with _warnings_of(native.logger) as told:
        library = native.library()
    if library is None:
        reason = told[0] if told else "C kernels are for Linux with PyTorch's OpenMP"
        yield Finding(
            topic="kernels", text=f"none: {reason}", advice="install gcc (apt install gcc); see docs/engine.md"
        )
        return
    attention = "attention on codes" if native.has_attention() else "attention by PyTorch"
    yield Finding(topic="kernels", text=f"compiled for this CPU, {attention}")


@contextmanager
def _warnings_of(logger: logging.Logger) -> Iterator[list[str]]:
    """Collect the warnings of a logger within the block, in place of showing them."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            lines.append(record.getMessage())
        return record.levelno < logging.WARNING

    logger.addFilter(collect)
    try:
        yield lines
    finally:
        logger.removeFilter(collect)


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(topic="GPU", text="none that PyTorch can use: everything runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(topic="GPU", text=f"cuda:{number} {name}, {_size(free)} of {_size(total)} free")


# --- models and room ---------------------------------------------------------------------------------------


def _models() -> Iterator[Finding]:
    for config, places in CHECKPOINTS.items():
        name = {STABLE_DIFFUSION: "Stable Diffusion v1", EMBEDDED: "embedded model"}[config]
        found = [path for path in places if path.is_file()]
        if found:
            yield Finding(topic="models", text=f"{name}: {found[0]} ({_size(found[0].stat().st_size)})")
        else:
            yield Finding(topic="models", text=f"{name}: no file at {places[0]}", advice=_ways_to_models(config))
        if found and config in TINY_DECODERS:
            tiny = TINY_DECODERS[config]
            there = str(tiny) if tiny.is_file() else f"none at {tiny}: --vae tiny needs --tiny_decoder FILE"
            yield Finding(topic="models", text=f"{name}, tiny decoder: {there}")
    for ckpt, files in CALI_CKPTS.items():
        there = [f"W{bits} {path.name}" for bits, path in files.items() if path.is_file()]
        if ckpt.is_file():
            yield Finding(topic="models", text=f"cali_ckpts of {ckpt.name}: {', '.join(there) or 'none'}")
    if not TOKENIZER.is_dir():
        advice = "python scripts/make_tokenizer.py"
        yield Finding(topic="models", text=f"the embedded model's tokenizer is not at {TOKENIZER}", advice=advice)


def _ways_to_models(config: Path) -> str:
    if config == EMBEDDED:
        return "the file belongs to the repository: get it whole (git checkout models)"
    return "put a checkpoint there, or give one by --ckpt (a file, a folder of diffusers or a hub's name)"


def _room(outdir: Path) -> Iterator[Finding]:
    memory = available_memory()
    place = next(each for each in (outdir, *outdir.absolute().parents) if each.exists())
    disk = shutil.disk_usage(place).free
    total = psutil.virtual_memory().total
    yield Finding(
        topic="room", text=f"{_size(memory)} of {_size(total)} memory available, {_size(disk)} free in {place}"
    )
    for job in JOBS:
        lacks = [
            name for name, needed, have in (("memory", job.memory, memory), ("disk", job.disk, disk)) if needed > have
        ]
        needs = f"{_size(job.memory)} of memory, {_size(job.disk)} of disk"
        advice = f"not enough {' and '.join(lacks)}: {job.way_out}" if lacks else None
        yield Finding(topic="room", text=f"Stable Diffusion v1, {job.name}: {needs}", advice=advice)


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= 0.1 * GB else f"{count / 1e6:.0f} MB"
