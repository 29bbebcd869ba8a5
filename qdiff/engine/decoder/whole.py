"""Decode with whole feature maps: the fastest way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.decoder.attention import attend
from qdiff.engine.decoder.layers import Convolution, convolve, convolved_stripes, new_map, upsample
from qdiff.engine.decoder.network import Attention, Block, FastDecoder, Residual
from qdiff.engine.decoder.statistics import Sums, affine, apply_affine


@torch.no_grad()
def decode(decoder: FastDecoder, z: Tensor) -> Tensor:
    """Return the pictures [B, 3, f h, f w], float32 and not clamped, of unscaled latents z [B, z_channels, h, w]."""
    return torch.cat([_decode(decoder, latent[None]) for latent in z])


def _decode(decoder: FastDecoder, z: Tensor) -> Tensor:
    x = decoder.first_features(z)
    for level in decoder.levels:
        # Maps are handed on without a name here, so that each is freed as soon as it has been read.
        x = x if level.upsampling is None else upsample(level.upsampling, x)
        for block in level.blocks:
            maps = [x]
            del x
            x = run_block(block, maps)
    return last(decoder, x)


def run_block(block: Block, maps: list[Tensor]) -> Tensor:
    """Return the output of a block for the map in the list, which is taken out of it and overwritten."""
    return _residual(block, maps.pop()) if isinstance(block, Residual) else _attention(block, maps.pop())


def _residual(block: Residual, x: Tensor) -> Tensor:
    operand = block.conv1.normed(block.norm1, x, silu=True)
    if block.shortcut is not None:
        x = convolve(block.shortcut, x, block.shortcut.operand)
    h = convolve(block.conv1, operand)
    del operand
    operand = block.conv2.normed(block.norm2, h, silu=True)
    del h
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
    lines = affine(decoder.norm_out, sums or Sums.of(x))
    out = new_map(decoder.conv_out, x.shape[2], x.shape[3], x.device)
    for start, stop, part in convolved_stripes(decoder.conv_out, x, lambda part: F.silu(apply_affine(part, lines))):
        out[:, :, start:stop] = part
    return out.contiguous()
