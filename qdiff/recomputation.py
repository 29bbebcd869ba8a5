"""Trade time for memory in the backward pass of a unit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qdiff.exchange import children_of
from qdiff.quant_layer import Quantizer


class Recomputed(nn.Module):
    """A part of a unit that keeps only its inputs for the backward pass, and computes its activations anew there.

    The part's hooks run again in the recomputation, as they belong to what it computes.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(self.part, *args, use_reentrant=False, **kwargs)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return a layer, or some layers, of a part that is a Sequential; these are not recomputed."""
        if not isinstance(self.part, nn.Sequential):
            raise TypeError(f"{type(self.part).__name__} has no layers to be indexed")
        return self.part[index]


@contextmanager
def recomputed(unit: nn.Module) -> Iterator[None]:
    """Within the block `Recomputed` stands in the slot of each part of a unit.

    Parts are the children that have parameters: attention, feed-forward, each half of a residual block. One of them at
    a time has activations in memory. Parts are put back at the end, also after an exception.
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
