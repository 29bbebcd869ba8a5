"""What a calibration will take, told before it starts."""

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dsdiff.cli.console import logger
from qdiff.calibrate import steps_of
from qdiff.calibration_set import CalibrationSet
from qdiff.config import ReconConfig
from qdiff.distributed import world_size
from qdiff.quant_block import MAX_SCORES
from qdiff.quant_model import QuantModel

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a calibration.

    activations: bytes of those of the largest unit. memory: bytes of main memory beyond the loaded model.
    gpu_memory: the same of each process's GPU, 0 without one.
    """

    seconds: float
    activations: int
    memory: int
    gpu_memory: int = 0

    def on_disk(self, cache: int) -> int:
        """Bytes of activations that do not fit into a cache of that many bytes."""
        return max(self.activations - cache, 0)


@torch.no_grad()
def estimate(qnn: QuantModel, data: CalibrationSet, recon: ReconConfig | None, batch_size: int, cache: int) -> Estimate:
    """From one forward pass of one batch, timed, with the sizes of every unit's input and output noted."""
    device = next(qnn.parameters()).device
    part = slice(0, min(batch_size, len(data)))
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        values = [value for value in (*args, *kwargs.values(), output) if isinstance(value, torch.Tensor)]
        sizes.append(sum(4 * value[0].numel() for value in values) * len(data))

    hooks = [unit.register_forward_hook(note, with_kwargs=True) for unit in qnn.units().values()]
    try:
        qnn(*data.batch(part, device))  # the first call is slower
        sizes.clear()
        _synchronize(device)
        began = time.perf_counter()
        qnn(*data.batch(part, device))
        _synchronize(device)
        sample_seconds = (time.perf_counter() - began) / (part.stop - part.start)
    finally:
        for hook in hooks:
            hook.remove()
    learned = [step for step in steps_of(qnn, recon) if step.phase != "ranges"]
    # A unit is reached twice, on average half way through the UNet; its own passes, over all units, make whole ones:
    # two evaluations, and iterations of forward and backward, which take three times a forward.
    passes = len(data) * (len(learned) + 5)
    if recon is not None:
        passes += 3 * recon.batch_size * (recon.iters_w + (recon.iters_a if qnn.config.quant_act else 0))
    activations = max(sizes) if learned else 0
    # Codes beside the weights; of the unit at work alpha, its gradient, Adam's two moments, and what the graph keeps of
    # them; of its samples what the graph keeps, and some attention matrices.
    weights = sum(4 * parameter.numel() for parameter in qnn.parameters())
    largest = max(sum(4 * p.numel() for p in unit.parameters()) for unit in qnn.units().values())
    working = 12 * largest + 24 * max(sizes) // len(data) * batch_size + 16 * MAX_SCORES
    at_work = int(weights * 0.15) + (working if learned else 0)
    on_gpu = at_work if device.type == "cuda" else 0
    return Estimate(
        seconds=sample_seconds * passes / world_size(),
        activations=activations * local_processes(),
        memory=(min(activations, cache) + at_work - on_gpu) * local_processes(),
        gpu_memory=on_gpu,
    )


def local_processes() -> int:
    """How many processes share this machine's memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_estimate(expected: Estimate, cache: int, folder: Path, device: torch.device) -> None:
    """Tell it, and raise ValueError where memory or disk will not do."""
    disk, free_disk = expected.on_disk(cache * local_processes()), shutil.disk_usage(_existing(folder)).free
    free_memory = available_memory()
    logger.info(
        "about %s, %.1f GiB more memory (%.1f available), %.1f GiB of disk (%.1f free)",
        _duration(expected.seconds),
        expected.memory / GIB,
        free_memory / GIB,
        disk / GIB,
        free_disk / GIB,
    )
    if disk > 0.95 * free_disk:
        raise ValueError(
            f"{disk / GIB:.1f} GiB of disk are needed in {str(folder)!r} and {free_disk / GIB:.1f} are free: "
            "use fewer --num_samples, a larger --cache_gb, or another --outdir"
        )
    if expected.memory > free_memory:
        raise ValueError(
            f"{expected.memory / GIB:.1f} GiB more memory are needed and {free_memory / GIB:.1f} are available: "
            "use a smaller --cache_gb or --batch_size"
        )
    if device.type == "cuda":
        check_gpu(expected.gpu_memory, available_gpu_memory(device))


def check_gpu(needed: int, free: int) -> None:
    """The same for a GPU's memory."""
    logger.info("%.1f GiB more of the GPU's memory (%.1f available)", needed / GIB, free / GIB)
    if needed > free:
        raise ValueError(
            f"{needed / GIB:.1f} GiB more of the GPU's memory are needed and {free / GIB:.1f} are available: "
            "use a smaller --batch_size, or --device cpu"
        )


def available_gpu_memory(device: torch.device) -> int:
    """Bytes: those that the GPU has left, and those that torch holds and does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def available_memory() -> int:
    """Bytes of main memory that can be had, by the system and by the limit of a container."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such limit
        return available
    return min(available, limit - used)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
