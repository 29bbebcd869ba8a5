"""Tell what a calibration will take in time, memory and disk, and refuse one that does not fit."""

import logging
import shutil
from pathlib import Path

import psutil
import torch

from dsdiff.calibration.needs import Estimate
from dsdiff.calibration.options import GIB

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


def check_estimate(expected: Estimate, folder: Path, device: torch.device) -> None:
    """Log the estimate. Raise ValueError where memory, disk or the GPU's memory will not do.

    folder: where files go.
    """
    free_memory, free_disk = available_memory(), shutil.disk_usage(_existing(folder)).free
    logger.info(
        "about %s, %s more memory (%s available), %s of disk (%s free)",
        duration(expected.seconds),
        size(expected.memory),
        size(free_memory),
        size(expected.disk),
        size(free_disk),
    )
    shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in expected.phases.items())
    logger.info("of it %s", shares)
    if expected.disk > 0.95 * free_disk:
        raise ValueError(
            f"{size(expected.disk)} of disk are needed in {str(folder)!r} and {size(free_disk)} are free: "
            "use fewer --num_samples, a larger --cache_gb, or another --outdir"
        )
    if expected.memory > free_memory:
        raise ValueError(
            f"{size(expected.memory)} more memory are needed and {size(free_memory)} are available: "
            "use a smaller --cache_gb or --batch_size, or with --rounding gptq fewer --samples_w"
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


def duration(seconds: float) -> str:
    """Return a time in words, of two digits or more."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f} MiB"
