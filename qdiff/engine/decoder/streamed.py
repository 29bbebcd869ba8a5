"""Decode in overlapping stripes of rows, with exact group norms: for large pictures on little memory.

Tiles that are decoded by themselves have other statistics in their group norms than the whole picture, which shows as
seams. Here each residual block passes over its input, a stripe with its neighbouring rows at a time, twice: first for
the sums that its second norm needs, then for its output. The convolutions of the first pass are computed anew in the
second one, so that a block holds its input, which its output overwrites, and one stripe. The doubled map before a block
that has fewer channels is not held either: its rows are computed as they are read. The result differs from that of
`whole` by rounding only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.decoder import whole
from qdiff.engine.decoder.layers import STRIPE, Convolution, UpsamplingConvolution, new_map, padded, stripes
from qdiff.engine.decoder.network import FastDecoder, Residual
from qdiff.engine.decoder.statistics import Lines, Sums, affine, apply_affine

PIXELS = 4 * STRIPE  # of a stripe: larger ones have fewer rows computed twice, and need more memory


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
    """The double of a map, whose rows are computed whenever they are read."""

    conv: UpsamplingConvolution
    small: Tensor
    sums: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.height, self.width = (2 * n for n in self.small.shape[2:])
        self.sums = Sums.none(self.conv.first.outputs, self.small.device)
        for start, stop in stripes(self.height, self.width, PIXELS):
            self.sums.add(self.rows(start, stop))

    def rows(self, start: int, stop: int) -> Tensor:
        first, end = start // 2, -(-stop // 2)
        out = new_map(self.conv.first, 2 * (end - first), self.width, self.small.device)
        self.conv(self.small, first, end, out)
        return out[:, :, start - 2 * first : stop - 2 * first]


@torch.no_grad()
def decode(decoder: FastDecoder, z: Tensor) -> Tensor:
    """Return what `whole.decode` does, up to rounding."""
    return torch.cat([_decode(decoder, latent[None]) for latent in z])


def _decode(decoder: FastDecoder, z: Tensor) -> Tensor:
    x = decoder.first_features(z)
    sums = Sums.of(x)
    for level in decoder.levels:
        source: Source = Stored(data=x, sums=sums)
        if level.upsampling is not None:
            source = Doubled(conv=level.upsampling, small=x)
        for block in level.blocks:
            if isinstance(block, Residual):
                x, sums = _residual(block, source)
            else:  # attention sees all pixels at once
                x = whole.run_block(block, [source.rows(0, source.height)])
                sums = Sums.of(x)
            source = Stored(data=x, sums=sums)
    return whole.last(decoder, x, sums)


def _residual(block: Residual, source: Source) -> tuple[Tensor, Sums]:
    """Return a block's output, which overwrites a stored input of its size, and its sums."""
    height, width = source.height, source.width
    first, between = affine(block.norm1, source.sums), Sums.none(block.conv1.outputs, source.sums.first.device)
    for start, stop in stripes(height, width, PIXELS):
        between.add(_normed(block.conv1, source.rows(*_around(start, stop, 1, height)), first, start, stop, height))
    device = source.sums.first.device
    second, sums = affine(block.norm2, between), Sums.none(block.conv2.outputs, device)
    kept = source.data if isinstance(source, Stored) and block.shortcut is None else None
    out = new_map(block.conv2, height, width, device) if kept is None else kept
    for start, stop, part in _outputs(block, source, first, second):
        out[:, :, start:stop] = part
        sums.add(part)
    return out, sums


def _outputs(block: Residual, source: Source, first: Lines, second: Lines) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the stripes of a block's output. The rows that were yielded may be overwritten in the source meanwhile."""
    height, above = source.height, None
    for start, stop in stripes(height, source.width, PIXELS):
        begin, end = _around(start, stop, 2, height)
        x = source.rows(begin, end)
        if above is not None:  # the rows above the stripe, as they were
            x = torch.cat([above, x[:, :, above.shape[2] :]], dim=2)
        above = x[:, :, max(0, stop - 2 - begin) : stop - begin].clone()
        from_row, to_row = _around(start, stop, 1, height)
        h = _normed(block.conv1, x, first, from_row, to_row, height)
        part = _normed(block.conv2, h, second, start, stop, height)
        own = x[:, :, start - begin : stop - begin]
        yield start, stop, part + (own if block.shortcut is None else block.shortcut(block.shortcut.operand(own)))


def _normed(conv: Convolution, x: Tensor, lines: Lines, start: int, stop: int, height: int) -> Tensor:
    """Return the rows start..stop of conv(SiLU(norm(x))). x: these rows and one more on both sides, within the map."""
    operand = conv.operand(F.silu(apply_affine(x, lines), inplace=True))
    return conv(padded(operand, height, start, stop, 1, conv.fill))


def _around(start: int, stop: int, halo: int, height: int) -> tuple[int, int]:
    """Return the rows start..stop with `halo` more on both sides, within a map of this height."""
    return max(0, start - halo), min(stop + halo, height)
