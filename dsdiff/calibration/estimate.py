"""Estimate what a calibration will take in time, memory and disk, and refuse one that does not fit."""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dsdiff.calibration.options import GIB
from qdiff.calibrate import calibration_steps
from qdiff.calibration_set import CalibrationSet
from qdiff.config import ReconConfig
from qdiff.distributed import world_size
from qdiff.quant_block import MAX_SCORES
from qdiff.quant_model import QuantModel

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The needs of a calibration, of all processes on this machine together.

    activations: bytes of the largest unit's inputs and outputs, in memory or on disk. memory: bytes of main memory
    beyond the loaded model. gpu_memory: the same for the GPU of each process, 0 without one.
    """

    seconds: float
    activations: int
    memory: int
    gpu_memory: int = 0

    def on_disk(self, cache: int) -> int:
        """Return the bytes of activations that do not fit into a cache of that many bytes."""
        return max(self.activations - cache, 0)


# --- what is needed ----------------------------------------------------------------------------------------


def estimate(qnn: QuantModel, data: CalibrationSet, recon: ReconConfig | None, batch_size: int, cache: int) -> Estimate:
    """Return the needs of a calibration, estimated from one timed forward pass of one batch.

    batch_size: samples per forward pass. cache: bytes of activations that are kept in memory.
    """
    device = next(qnn.parameters()).device
    seconds, sizes = _measure(qnn, data, batch_size)
    learned = [step for step in calibration_steps(qnn, recon) if step.phase != "ranges"]
    # A unit is reached twice, on average half way through the UNet; its own passes, over all units, make whole ones:
    # two evaluations, and iterations of forward and backward, which take three times a forward.
    passes = len(data) * (len(learned) + 5)
    if recon is not None:
        passes += 3 * recon.batch_size * (recon.iters_w + (recon.iters_a if qnn.config.quant_act else 0))
    activations = max(sizes) * len(data) if learned else 0
    # Codes beside the weights; of the unit at work alpha, its gradient, Adam's two moments, and what the graph keeps of
    # them; of its samples what the graph keeps, and some attention matrices.
    weights = sum(4 * parameter.numel() for parameter in qnn.parameters())
    largest = max(sum(4 * p.numel() for p in unit.parameters()) for unit in qnn.units().values())
    working = 12 * largest + 24 * max(sizes) * batch_size + 16 * MAX_SCORES
    at_work = int(weights * 0.15) + (working if learned else 0)
    on_gpu = at_work if device.type == "cuda" else 0
    return Estimate(
        seconds=seconds * passes / world_size(),
        activations=activations * local_processes(),
        memory=(min(activations, cache) + at_work - on_gpu) * local_processes(),
        gpu_memory=on_gpu,
    )


@torch.no_grad()
def _measure(qnn: QuantModel, data: CalibrationSet, batch_size: int) -> tuple[float, list[int]]:
    """Return the seconds that a sample takes in a forward pass, and the bytes of its input and output in each unit."""
    device = next(qnn.parameters()).device
    part = slice(0, min(batch_size, len(data)))
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        values = [value for value in (*args, *kwargs.values(), output) if isinstance(value, Tensor)]
        sizes.append(sum(4 * value[0].numel() for value in values))

    hooks = [unit.register_forward_hook(note, with_kwargs=True) for unit in qnn.units().values()]
    try:
        qnn(*data.batch(part, device))  # the first call is slower
        sizes.clear()
        _synchronize(device)
        began = time.perf_counter()
        qnn(*data.batch(part, device))
        _synchronize(device)
        return (time.perf_counter() - began) / (part.stop - part.start), sizes
    finally:
        for hook in hooks:
            hook.remove()


def local_processes() -> int:
    """Return how many processes of this calibration share the machine's memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what there is -----------------------------------------------------------------------------------------


def check_estimate(expected: Estimate, cache: int, folder: Path, device: torch.device) -> None:
    """Log the estimate. Raise ValueError where memory, disk or the GPU's memory will not do.

    cache: bytes of activations that each process keeps in memory. folder: where the rest goes.
    """
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
    """Log the bytes of the GPU's memory that are needed. Raise ValueError if fewer are free."""
    logger.info("%.1f GiB more of the GPU's memory (%.1f available)", needed / GIB, free / GIB)
    if needed > free:
        raise ValueError(
            f"{needed / GIB:.1f} GiB more of the GPU's memory are needed and {free / GIB:.1f} are available: "
            "use a smaller --batch_size, or --device cpu"
        )


def available_gpu_memory(device: torch.device) -> int:
    """Return the bytes that the GPU has left, together with those that torch holds and does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def available_memory() -> int:
    """Return the bytes of main memory that this process can get, by the system and by the limit of a container."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return available
    return min(available, limit - used)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
