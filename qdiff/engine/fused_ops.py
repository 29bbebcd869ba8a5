"""Fused norm, activation and attention operations that end in the uint8 input of the next integer layer.

Our C kernels (see `native`) compute an operation and the quantization after it in one pass over memory, with float32
inside, for features in float32 and bfloat16. Without the kernels, and in float16, PyTorch computes both.

Feature maps are [B, C, H, W] in channels_last order, tokens [B, N, C]. Codes are laid out as the tensor they stand for.
Codes of more than 8 bits are two such tensors, [2, ...]: their low bytes and their high bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import native
from qdiff.engine.quant_params import QuantParams

MAX_HEAD_WIDTH = 256  # the attention kernel's limit
SLICE = 256  # pixels of a feature map whose sums one thread computes in a group norm


def quantize(x: Tensor, *params: QuantParams) -> list[Tensor]:
    """Return the codes of x by each of `params`, each uint8 of x's shape, or [2, *shape] of more than 8 bits.

    For finite x the codes are those of UniformAffineQuantizer, bit for bit. For NaN they are undefined.
    """
    rows = _evenly_spaced(x) if _has_kernel(x) else None
    if rows is None:
        wide = x.float()
        return [_as_bytes((wide / p.delta).round_().add_(p.zero_point).clamp_(0, p.high), p) for p in params]
    planes = [2 if p.is_wide else 1 for p in params]
    out = torch.empty(sum(planes), *_channels_at_the_end(x).shape, dtype=torch.uint8)
    native.call("quantize", x, x.dtype == torch.bfloat16, *rows, params, len(params), out)
    out = out.movedim(-1, 2) if x.ndim == 4 else out
    return [part if len(part) > 1 else part[0] for part in out.split(planes)]


def _as_bytes(codes: Tensor, params: QuantParams) -> Tensor:
    """Return whole numbers in 0..params.high as uint8, two tensors for wide codes."""
    if not params.is_wide:
        return codes.to(torch.uint8)
    whole = codes.to(torch.int32)
    return torch.stack([whole & 255, whole >> 8]).to(torch.uint8)


def _empty_codes(shape: Sequence[int], params: QuantParams) -> Tensor:
    """Return an uninitialised tensor for codes of `shape`, whose last dimension has the channels."""
    return torch.empty(*([2] if params.is_wide else []), *shape, dtype=torch.uint8)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x) for x [..., C], in x's dtype."""
    if not _has_kernel(x, norm):
        return norm(x) if x.dtype == torch.float32 else _in_float32(norm, x).to(x.dtype)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    native.call(
        "layer_norm", x, x.dtype == torch.bfloat16, x.numel() // width, width, norm.weight, norm.bias, norm.eps, out
    )
    return out


def group_norm(
    norm: nn.GroupNorm, x: Tensor, params: QuantParams, *, added: Tensor | None = None, silu: bool = False
) -> Tensor:
    """Return the codes of norm(x + added), or of SiLU of it.

    x: [B, C, *spatial]. added: float32 [B, C], or None for nothing.
    """
    if not _has_kernel(x, norm) or x.ndim != 4 or x.numel() == 0:
        return quantize(_group_norm(norm, x, added, silu), params)[0]
    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    slices = max(1, math.ceil(size / SLICE))
    sums = torch.empty(samples * slices * 2 * channels)
    lines = torch.empty(samples * 2 * channels)
    out = _empty_codes(x.permute(0, 2, 3, 1).shape, params)
    added = None if added is None else added.float().contiguous()
    native.call(
        "group_norm", x, x.dtype == torch.bfloat16, samples, size, channels, added, norm.num_groups, norm.weight,
        norm.bias, norm.eps, silu, [params], slices, sums, lines, out
    )  # fmt: skip
    return out.movedim(-1, -3)


def _group_norm(norm: nn.GroupNorm, x: Tensor, added: Tensor | None, silu: bool) -> Tensor:
    if added is not None:
        x = x + added.to(x.dtype).reshape(*added.shape, *[1] * (x.ndim - 2))
    y = norm(x) if x.dtype == torch.float32 else _in_float32(norm, x)
    return F.silu(y) if silu else y


def geglu(x: Tensor, params: QuantParams) -> Tensor:
    """Return the codes [..., n] of value * gelu(gate) for x = [value, gate], [..., 2 n]."""
    if not _has_kernel(x):
        value, gate = x.chunk(2, dim=-1)
        return quantize(value * F.gelu(gate), params)[0]
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = _empty_codes([*x.shape[:-1], width], params)
    native.call("geglu", x, x.dtype == torch.bfloat16, x.numel() // (2 * width), width, [params], out)
    return out


Three = tuple[QuantParams, QuantParams, QuantParams]


@dataclass(frozen=True, kw_only=True)
class SoftmaxParams:
    """The quantizer of a softmax: code = clamp(round(p / delta), 0, high) for a probability p. high: 2^bits - 1."""

    delta: float
    high: int


FREE = SoftmaxParams(delta=1 / 65535, high=65535)  # what the kernel computes with at least


def attention(
    codes: tuple[Tensor, Tensor, Tensor],
    inputs: Three,
    heads: int,
    output: QuantParams,
    dtype: torch.dtype,
    *,
    softmax: SoftmaxParams = FREE,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the codes [B, N, heads d] of softmax(q k^T / sqrt(d)) v.

    codes: q [B, N, heads d], k and v [B, M, heads d], uint8. inputs: the quantizers of the three, of 8 bits at most.
    output: the quantizer of the result. softmax: the quantizer of the probabilities, of 16 bits at most. mask: bool
    [B, M], False for keys that no query sees (a query that sees none gets 0); or float [B, M], added to the scores. The
    N x M scores are never stored.

    Our kernel computes in whole numbers, probabilities in 16 bits (see kernels/attention.c). Where it cannot run (see
    `has_integer_attention`), PyTorch computes in `dtype`, without the quantizer of the softmax. Raises ValueError if
    the shapes do not fit each other.
    """
    if codes[1].shape != codes[2].shape or len(codes[0]) != len(codes[1]):
        shapes = ", ".join(str(list(each.shape)) for each in codes)
        raise ValueError(f"q, k and v of {shapes} do not fit each other: a context needs the batch of its latents")
    if has_integer_attention(codes[0].device, inputs, codes[0].shape[-1] // heads):
        return _integer_attention(codes, inputs, heads, output, softmax, mask)
    # c - Z is a whole number of 9 bits, which bfloat16 and float16 hold exactly. In float16 sums of products could
    # overflow, so codes are multiplied by their steps first.
    steps = [params.delta if dtype == torch.float16 else 1.0 for params in inputs]
    q, k, v = (
        ((each.float() - params.zero_point) * step).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
        for each, params, step in zip(codes, inputs, steps, strict=True)
    )
    scale = inputs[0].delta / steps[0] * inputs[1].delta / steps[1] * q.shape[-1] ** -0.5
    seen = None if mask is None else (mask if mask.dtype == torch.bool else mask.to(q.dtype))[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return quantize(out.transpose(1, 2).flatten(2), _of_multiples(output, inputs[2].delta / steps[2]))[0]


def _of_multiples(params: QuantParams, step: float) -> QuantParams:
    """Return the quantizer that gives x the code that `params` gives x * step."""
    return replace(params, delta=params.delta / step)


def has_integer_attention(device: torch.device, inputs: Three, width: int) -> bool:
    """Return whether our attention kernel can run. inputs: the quantizers of q, k and v. width: of a head."""
    in_bytes = all(0 <= params.zero_point <= 255 and not params.is_wide for params in inputs)
    return device.type == "cpu" and in_bytes and width <= MAX_HEAD_WIDTH and native.has_attention()


def _integer_attention(
    codes: tuple[Tensor, Tensor, Tensor],
    inputs: Three,
    heads: int,
    output: QuantParams,
    softmax: SoftmaxParams,
    mask: Tensor | None,
) -> Tensor:
    q, k, v = (each.contiguous() for each in codes)
    batch, queries, width = q.shape
    sizes = (k.shape[1], width // heads)
    scale = inputs[0].delta * inputs[1].delta * sizes[1] ** -0.5 / math.log(2)
    workspace = torch.empty(native.call("attention_bytes", batch * heads, *sizes), dtype=torch.uint8)
    seen = bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.to(torch.uint8).contiguous()
    elif mask is not None:
        bias = mask.float().div(math.log(2)).contiguous()
    out = _empty_codes(q.shape, output)
    native.call(
        "attention", q, k, v, seen, bias, batch, heads, queries, *sizes, scale, inputs[0].zero_point,
        inputs[2].zero_point, softmax.delta, softmax.high, [_of_multiples(output, inputs[2].delta)], workspace, out
    )  # fmt: skip
    return out


def _in_float32(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    """Return norm(x) in float32, whatever the dtype of x and of the norm's weights."""
    weight, bias = (None if each is None else each.float() for each in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def fuses(x: Tensor) -> bool:
    """Return whether features like x go through the operations of this module: in float32 with our kernels only."""
    return x.dtype != torch.float32 or _has_kernel(x)


# --- tensors as rows ---------------------------------------------------------------------------------------


def _has_kernel(x: Tensor, norm: nn.LayerNorm | nn.GroupNorm | None = None) -> bool:
    """Return whether our kernels can read x, and the weights of the norm."""
    if norm is not None and (norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32):
        return False
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and not (torch.is_grad_enabled() and x.requires_grad) and native.library() is not None


def _evenly_spaced(x: Tensor) -> tuple[int, int, int] | None:
    """Return the number of rows of x, their width, and the distance from one to the next; None if that varies."""
    x = _channels_at_the_end(x)
    width = x.shape[-1]
    if x.numel() == 0 or (width > 1 and x.stride(-1) != 1):
        return None
    sizes = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    for (_, outer), (n, inner) in pairwise(sizes):
        if outer != n * inner:
            return None
    return x.numel() // width, width, sizes[-1][1] if sizes else width


def _channels_at_the_end(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x
