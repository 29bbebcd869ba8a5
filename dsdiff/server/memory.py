"""The memory that a piece of work needs at most."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PEAK = "VmHWM:"  # of Linux: the most resident memory since it was reset
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The most bytes held within a block, the model included. Of a GPU it is what torch holds there."""

    bytes: int = 0


@contextmanager
def peak_within(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of memory within the block. Where the system keeps no peak, it is the memory at its end."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    known = _reset_peak()
    try:
        yield peak
    finally:
        peak.bytes = (_peak() if known else None) or psutil.Process().memory_info().rss


def _reset_peak() -> bool:
    try:
        RESET.write_text("5")
    except OSError:  # another system, or a container that does not let us
        return False
    return True


def _peak() -> int | None:
    lines = [line.split() for line in STATUS.read_text().splitlines() if line.startswith(PEAK)]
    return int(lines[0][1]) * 1024 if lines else None
