"""Trade time for memory in the backward pass of a unit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qdiff.exchange import children_of
from qdiff.quantizers import Quantizer


class Recomputed(nn.Module):
    """A part of a unit that keeps only its inputs for the backward pass, which computes its activations anew.

    The part's hooks run again then, since they may change what it computes.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(self.part, *args, use_reentrant=False, **kwargs)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return one layer or several layers of a Sequential part; these are not recomputed."""
        if not isinstance(self.part, nn.Sequential):
            raise TypeError(f"{type(self.part).__name__} has no layers to be indexed")
        return self.part[index]


@contextmanager
def recomputed(unit: nn.Module) -> Iterator[None]:
    """Wrap each part of a unit into `Recomputed` within the block.

    Parts are the children that have parameters: attention, feed-forward, each half of a residual block. Only one part
    at a time has its activations in memory. The parts are unwrapped at the end, also after an exception.
    """
    parts = {
        name: part
        for name, part in children_of(unit)
        if not isinstance(part, Quantizer) and any(True for _ in part.parameters())
    }
    try:
        for name, part in parts.items():
            setattr(unit, name, Recomputed(part))
        yield
    finally:
        for name, part in parts.items():
            setattr(unit, name, part)
