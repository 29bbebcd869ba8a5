"""What stands between the integer products of a packed UNet: each of these ends in the codes of the next product.

In float32 it is PyTorch's arithmetic, so that nothing differs from the simulation. In bfloat16 norms, activation
functions and the quantization that follows are one pass over memory, computed in float32 within it: by our kernels
where there is a compiler for this CPU; else, and in float16, by PyTorch.

Feature maps are [B, C, H, W] in channels_last order, tokens [B, N, C]; codes are laid out as what they are of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import native

MAX_HEAD_WIDTH = 256  # of the kernel for attention
ROWS_OF_A_SLICE = 256  # of pixels that one thread sums up for a group norm


class Codes(Protocol):
    """What has a Range's numbers: a Range, or a layer, whose input they are of."""

    delta: float
    zero_point: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Range:
    """How numbers become codes: clamp(round(x / delta) + zero_point, 0, high)."""

    delta: float
    zero_point: int
    high: int


def quantize(x: Tensor, *to: Codes) -> list[Tensor]:
    """The codes of x by each of `to`, uint8: those of UniformAffineQuantizer, bit for bit, of finite x."""
    rows = _rows(x) if _native(x) else None
    if rows is None:
        wide = x.float()
        return [(wide / one.delta).round_().add_(one.zero_point).clamp_(0, one.high).to(torch.uint8) for one in to]
    outputs = torch.empty(len(to), *_in_rows(x).shape, dtype=torch.uint8)
    native.call("quantize", x, _is_bfloat16(x), *rows, native.ranges(to), len(to), outputs)
    return [output.permute(0, 3, 1, 2) if x.ndim == 4 else output for output in outputs]


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), of x [..., C]."""
    if x.dtype == torch.float32:
        return norm(x)
    if not _native(x, norm):
        return _in_float32(norm, x).to(x.dtype)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    native.call("layer_norm", x, True, x.numel() // width, width, norm.weight, norm.bias, norm.eps, out)
    return out


def group_norm(norm: nn.GroupNorm, x: Tensor, to: Codes, *, added: Tensor | None = None, silu: bool = False) -> Tensor:
    """Codes of norm(x + added), through SiLU if asked for. x [B, C, *spatial]; added [B, C] float32, or None."""
    if x.dtype == torch.float32 or not _native(x, norm) or x.ndim != 4 or x.numel() == 0:
        return quantize(_group_norm(norm, x, added, silu), to)[0]
    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    slices = max(1, math.ceil(size / ROWS_OF_A_SLICE))
    sums = torch.empty(samples * slices * 2 * channels)
    lines, out = torch.empty(samples * 2 * channels), _like(x)
    added = None if added is None else added.float().contiguous()
    native.call(
        "group_norm", x, True, samples, size, channels, added, norm.num_groups, norm.weight, norm.bias, norm.eps, silu,
        native.ranges([to]), slices, sums, lines, out
    )  # fmt: skip
    return out


def _group_norm(norm: nn.GroupNorm, x: Tensor, added: Tensor | None, silu: bool) -> Tensor:
    if added is not None:
        x = x + added.to(x.dtype).reshape(*added.shape, *[1] * (x.ndim - 2))
    y = norm(x) if x.dtype == torch.float32 else _in_float32(norm, x)
    return F.silu(y) if silu else y


def geglu(x: Tensor, to: Codes) -> Tensor:
    """Codes of value * gelu(gate), of x = [value, gate] [..., 2 n]: [..., n]."""
    if x.dtype == torch.float32 or not _native(x):
        value, gate = x.chunk(2, dim=-1)
        return quantize(value * F.gelu(gate), to)[0]
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=torch.uint8)
    native.call("geglu", x, True, x.numel() // (2 * width), width, native.ranges([to]), out)
    return out


def attention(
    codes: tuple[Tensor, Tensor, Tensor], of: tuple[Codes, Codes, Codes], heads: int, to: Codes, dtype: torch.dtype
) -> Tensor:
    """Codes of softmax(q k^T / sqrt(d)) v, computed in `dtype`: [B, N, heads d].

    codes: of q [B, N, heads d], k and v [B, M, heads d], by the ranges `of`. No matrix of N x M is held.
    """
    if codes[1].shape != codes[2].shape or len(codes[0]) != len(codes[1]):
        shapes = ", ".join(str(list(own.shape)) for own in codes)
        raise ValueError(f"q, k and v of {shapes} do not fit each other: a context needs the batch of its latents")
    if dtype == torch.bfloat16 and _in_tiles(codes, of, heads):
        return _tiled_attention(codes, of, heads, to)
    # Whole numbers in bfloat16, which holds those of bytes; in float16, where sums might not fit, times their steps.
    steps = [one.delta if dtype == torch.float16 else 1.0 for one in of]
    q, k, v = (
        ((own.float() - one.zero_point) * step).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
        for own, one, step in zip(codes, of, steps, strict=True)
    )
    scale = of[0].delta / steps[0] * of[1].delta / steps[1] * q.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return quantize(out.transpose(1, 2).flatten(2), _without_step(to, of[2].delta / steps[2]))[0]


def _without_step(to: Codes, step: float) -> Codes:
    """The same codes, of numbers that are still to be multiplied by `step`."""
    return Range(delta=to.delta / step, zero_point=to.zero_point, high=to.high)


def _in_tiles(codes: Sequence[Tensor], of: Sequence[Codes], heads: int) -> bool:
    """Whether the kernel can: differences from a zero point that is a code fit into bfloat16."""
    in_bytes = all(own.device.type == "cpu" for own in codes) and 0 <= of[2].zero_point <= 255
    return in_bytes and codes[0].shape[-1] // heads <= MAX_HEAD_WIDTH and native.has_attention()


def _tiled_attention(
    codes: tuple[Tensor, Tensor, Tensor], of: tuple[Codes, Codes, Codes], heads: int, to: Codes
) -> Tensor:
    q, k, v = (own.contiguous() for own in codes)
    batch, queries, width = q.shape
    sizes = (k.shape[1], width // heads)
    scale = of[0].delta * of[1].delta * sizes[1] ** -0.5 / math.log(2)
    workspace = torch.empty(native.attention_bytes(batch * heads, *sizes), dtype=torch.uint8)
    out = torch.empty_like(q)
    zeros = (float(of[0].zero_point), float(of[2].zero_point))
    native.call(
        "attention", q, k, v, batch, heads, queries, *sizes, scale, *zeros,
        native.ranges([_without_step(to, of[2].delta)]), workspace, out
    )  # fmt: skip
    return out


def _in_float32(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = (None if own is None else own.float() for own in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


# --- tensors as rows ---------------------------------------------------------------------------------------


def _native(x: Tensor, norm: nn.LayerNorm | nn.GroupNorm | None = None) -> bool:
    """Whether our kernels can read x, and the weights of the norm."""
    if norm is not None and (norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32):
        return False
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and not (torch.is_grad_enabled() and x.requires_grad) and native.library() is not None


def _is_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _rows(x: Tensor) -> tuple[int, int, int] | None:
    """How many rows x has, how wide they are, and how far apart they lie; None where they do not lie evenly."""
    order = _in_rows(x)
    width = order.shape[-1]
    if x.numel() == 0 or (width > 1 and order.stride(-1) != 1):
        return None
    sizes = [(n, s) for n, s in zip(order.shape[:-1], order.stride()[:-1], strict=True) if n > 1]
    for (_, outer), (n, inner) in pairwise(sizes):
        if outer != n * inner:
            return None
    return x.numel() // width, width, sizes[-1][1] if sizes else width


def _in_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _like(x: Tensor) -> Tensor:
    """Room for the codes of x."""
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.uint8, memory_format=layout)
