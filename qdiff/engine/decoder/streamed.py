"""Decode in overlapping stripes of rows, with exact group norms: for large pictures on little memory.

Tiles that are decoded by themselves have other statistics in their group norms than the whole picture, which shows as
seams. Here each residual block passes over its input, a stripe with its neighbouring rows at a time, twice: first for
the sums that its second norm needs, then for its output. The convolutions of the first pass are computed anew in the
second one, so that a block holds its input, which its output overwrites, and one stripe. The doubled map before a block
that has fewer channels is not held either: its rows are computed as they are read. The result differs from that of
`whole` by rounding only.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qdiff.engine.decoder import whole
from qdiff.engine.decoder.layers import STRIPE, new_map, stripes
from qdiff.engine.decoder.network import FastDecoder, Residual
from qdiff.engine.decoder.sources import Doubled, Source, Stored, around, normed
from qdiff.engine.decoder.statistics import Lines, Sums, affine

PIXELS = 2 * STRIPE  # of a stripe: larger ones have fewer rows computed twice, and need more memory


@torch.no_grad()
def decode(decoder: FastDecoder, z: Tensor, between: Callable[[], object] = lambda: None) -> Tensor:
    """Return what `whole.decode` does, up to rounding."""
    return torch.cat([_decode(decoder, latent[None], between) for latent in z])


def _decode(decoder: FastDecoder, z: Tensor, between: Callable[[], object]) -> Tensor:
    x, groups = decoder.first_features(z), decoder.norm_out.num_groups
    sums = Sums.of(x, groups)
    for level in decoder.levels:
        source: Source = Stored(data=x, sums=sums)
        if level.upsampling is not None:
            source = Doubled(conv=level.upsampling, small=x, groups=groups)
        for block in level.blocks:
            if isinstance(block, Residual):
                x, sums = _residual(block, source)
            else:  # attention sees all pixels at once
                x = whole.run_block(block, [source.rows(0, source.height)])
                sums = Sums.of(x, groups)
            source = Stored(data=x, sums=sums)
        between()
    return whole.last(decoder, x, sums)


def _residual(block: Residual, source: Source) -> tuple[Tensor, Sums]:
    """Return a block's output, which overwrites a stored input of its size, and its sums."""
    height, width = source.height, source.width
    groups, device = block.norm2.num_groups, source.sums.mean.device
    first, between = affine(block.norm1, source.sums), Sums.none(groups, device)
    for start, stop in stripes(height, width, PIXELS):
        between.add(normed(block.conv1, source.rows(*around(start, stop, 1, height)), first, start, stop, height))
    second, sums = affine(block.norm2, between), Sums.none(groups, device)
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
        begin, end = around(start, stop, 2, height)
        x = source.rows(begin, end)
        if above is not None:  # the rows above the stripe, as they were
            x = torch.cat([above, x[:, :, above.shape[2] :]], dim=2)
        above = x[:, :, max(0, stop - 2 - begin) : stop - begin].clone()
        from_row, to_row = around(start, stop, 1, height)
        h = normed(block.conv1, x, first, from_row, to_row, height)
        part = normed(block.conv2, h, second, start, stop, height)
        own = x[:, :, start - begin : stop - begin]
        yield start, stop, part + (own if block.shortcut is None else block.shortcut(block.shortcut.operand(own)))
