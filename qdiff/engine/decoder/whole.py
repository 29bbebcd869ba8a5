"""Decode with whole feature maps: the fastest way."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.decoder.attention import attend
from qdiff.engine.decoder.layers import (
    Convolution,
    UpsamplingConvolution,
    convolve,
    convolved_stripes,
    new_map,
    stripes,
    upsample,
)
from qdiff.engine.decoder.network import Attention, Block, FastDecoder, Residual
from qdiff.engine.decoder.sources import Doubled, around, normed
from qdiff.engine.decoder.statistics import Sums, affine, apply_affine


@torch.no_grad()
def decode(decoder: FastDecoder, z: Tensor, between: Callable[[], object] = lambda: None) -> Tensor:
    """Return the pictures [B, 3, f h, f w], float32 and not clamped, of unscaled latents z [B, z_channels, h, w].

    between: called within and after each level, when maps were freed.
    """
    return torch.cat([_decode(decoder, latent[None], between) for latent in z])


def _decode(decoder: FastDecoder, z: Tensor, between: Callable[[], object]) -> Tensor:
    x = decoder.first_features(z)
    for level in decoder.levels:
        blocks = level.blocks
        if level.upsampling is not None:
            x, blocks = _entry(level.upsampling, blocks, x)
            between()
        for block in blocks:
            maps = [x]  # handed on without a name here, so that it is freed as soon as it has been read
            del x
            x = run_block(block, maps)
        between()
    return last(decoder, x)


def _entry(conv: UpsamplingConvolution, blocks: tuple[Block, ...], x: Tensor) -> tuple[Tensor, tuple[Block, ...]]:
    """Return the double of x, or the output of the first block for it, and the blocks that are left to run.

    If the first block has fewer channels, the double of x, the largest map of all, is not held: its rows are computed
    once for the sums of the norm, and once more for the first convolution and the shortcut.
    """
    block = blocks[0]
    if not isinstance(block, Residual) or block.shortcut is None:
        return upsample(conv, x), blocks
    source = Doubled(conv=conv, small=x, groups=block.norm1.num_groups)
    lines, size = affine(block.norm1, source.sums), (source.height, source.width)
    h, x = (new_map(each, *size, source.small.device) for each in (block.conv1, block.shortcut))
    for start, stop in stripes(*size):
        begin, end = around(start, stop, 1, source.height)
        rows = source.rows(begin, end)
        h[:, :, start:stop] = normed(block.conv1, rows, lines, start, stop, source.height)
        own = rows[:, :, start - begin : stop - begin]
        x[:, :, start:stop] = block.shortcut(block.shortcut.operand(own))
    del source, rows, own
    return _second_half(block, [h], x), blocks[1:]


def run_block(block: Block, maps: list[Tensor]) -> Tensor:
    """Return the output of a block for the map in the list, which is taken out of it and overwritten."""
    return _residual(block, maps.pop()) if isinstance(block, Residual) else _attention(block, maps.pop())


def _residual(block: Residual, x: Tensor) -> Tensor:
    operand = block.conv1.normed(block.norm1, x, silu=True)
    if block.shortcut is not None:
        x = convolve(block.shortcut, x, block.shortcut.operand)
    h = convolve(block.conv1, operand)
    del operand
    maps = [h]
    del h
    return _second_half(block, maps, x)


def _second_half(block: Residual, maps: list[Tensor], x: Tensor) -> Tensor:
    """Add conv2(SiLU(norm2(h))) to x in place, and return x. h is taken out of the list."""
    operand = block.conv2.normed(block.norm2, maps.pop(), silu=True)
    return _add(block.conv2, operand, x)


def _attention(block: Attention, x: Tensor) -> Tensor:
    q, k, v = convolve(block.qkv, block.qkv.normed(block.norm, x, silu=False)).chunk(3, dim=1)
    return _add(block.proj_out, block.proj_out.operand(attend(q, k, v)), x)


def _add(conv: Convolution, operand: Tensor, x: Tensor) -> Tensor:
    """Add conv(operand) to x in place, and return x."""
    for start, stop, part in convolved_stripes(conv, operand):
        x[:, :, start:stop].add_(part)
    return x


def last(decoder: FastDecoder, x: Tensor, sums: Sums | None = None) -> Tensor:
    """Return the picture of the last features: norm, SiLU and convolution, in float32. sums: of x, if known."""
    lines = affine(decoder.norm_out, sums or Sums.of(x, decoder.norm_out.num_groups))
    out = new_map(decoder.conv_out, x.shape[2], x.shape[3], x.device)
    for start, stop, part in convolved_stripes(decoder.conv_out, x, lambda part: F.silu(apply_affine(part, lines))):
        out[:, :, start:stop] = part
    return out.contiguous()
