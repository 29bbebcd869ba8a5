"""The memory that a piece of work needs at most."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dsdiff.memory import PeakMemory


@dataclass
class Peak:
    """The most bytes held within a block, the model included, without mapped files. Of a GPU it is what torch holds."""

    bytes: int = 0


@contextmanager
def peak_within(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of memory within the block."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    watched = PeakMemory()
    try:
        with watched:
            yield peak
    finally:
        peak.bytes = watched.own
