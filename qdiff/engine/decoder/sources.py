"""Feature maps whose rows can be read, held or computed when they are needed, and a convolution that reads them."""

from dataclasses import dataclass, field
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.decoder.layers import STRIPE, Convolution, UpsamplingConvolution, new_map, padded, stripes
from qdiff.engine.decoder.statistics import Lines, Sums, apply_affine


class Source(Protocol):
    """A feature map whose rows can be had. height, width: its size. sums: those of its group norm."""

    height: int
    width: int
    sums: Sums

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the features [1, C, stop - start, W] of rows within the map."""
        ...


@dataclass(kw_only=True)
class Stored:
    """A map that is held, [1, C, H, W]."""

    data: Tensor
    sums: Sums

    def __post_init__(self) -> None:
        self.height, self.width = self.data.shape[2:]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.data[:, :, start:stop]


@dataclass(kw_only=True)
class Doubled:
    """The double of a map, whose rows are computed whenever they are read. groups: of its norm."""

    conv: UpsamplingConvolution
    small: Tensor
    groups: int
    sums: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.height, self.width = (2 * n for n in self.small.shape[2:])
        self.sums = Sums.none(self.groups, self.small.device)
        for start, stop in stripes(self.height, self.width, 2 * STRIPE):
            self.sums.add(self.rows(start, stop))

    def rows(self, start: int, stop: int) -> Tensor:
        first, end = start // 2, -(-stop // 2)
        out = new_map(self.conv.first, 2 * (end - first), self.width, self.small.device)
        self.conv(self.small, first, end, out)
        return out[:, :, start - 2 * first : stop - 2 * first]


def normed(conv: Convolution, x: Tensor, lines: Lines, start: int, stop: int, height: int) -> Tensor:
    """Return the rows start..stop of conv(SiLU(norm(x))). x: these rows and one more on both sides, within the map."""
    operand = conv.operand(F.silu(apply_affine(x, lines), inplace=True))
    return conv(padded(operand, height, start, stop, 1, conv.fill))


def around(start: int, stop: int, halo: int, height: int) -> tuple[int, int]:
    """Return the rows start..stop with `halo` more on both sides, within a map of this height."""
    return max(0, start - halo), min(stop + halo, height)
