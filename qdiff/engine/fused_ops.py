"""Fused norm, activation and attention operations that end in the uint8 input of the next integer layer.

Our C kernels (see `native`) compute an operation and the quantization after it in one pass over memory, with float32
inside, for features in float32 and bfloat16. On GPUs our Triton kernels do. Without kernels PyTorch computes both.

Feature maps are [B, C, H, W] in channels_last order, tokens [B, N, C]. Codes are laid out as the tensor they stand for.
Codes of more than 8 bits are two such tensors, [2, ...]: their low bytes and their high bytes. Triton's kernels return
codes of at most 8 bits as int8, less 128 (`quant_params.signed`), and all layers take both.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import dynamic_ops, native
from qdiff.engine.features import (
    SLICE,
    as_bytes,
    channels_at_the_end,
    empty_codes,
    evenly_spaced,
    gpu_kernels,
    group_norm_by_torch,
    has_kernel,
    has_triton,
    in_float32,
)
from qdiff.engine.quant_params import Codes, DynamicParams, Params, QuantParams, unsigned

MAX_HEAD_WIDTH = 256  # the attention kernel's limit


def quantize(x: Tensor, *params: Params) -> list[Any]:
    """Return the codes of x by each of `params`, each uint8 of x's shape, or [2, *shape] of more than 8 bits.

    For finite x the codes are those of UniformAffineQuantizer, bit for bit. For NaN they are undefined. By
    DynamicParams codes are DynamicCodes, which equal params share.
    """
    if any(isinstance(p, DynamicParams) for p in params):
        made = {p: dynamic_ops.quantize(x, p) if isinstance(p, DynamicParams) else _quantize(x, p)[0] for p in params}
        return [made[p] for p in params]
    return _quantize(x, *cast(tuple[QuantParams, ...], params))


def _quantize(x: Tensor, *params: QuantParams) -> list[Tensor]:
    kernels = gpu_kernels(x)
    if kernels is not None and not any(p.is_wide for p in params):
        return kernels.quantize(x, params)
    rows = evenly_spaced(x) if has_kernel(x) else None
    if rows is None:
        wide = x.float()
        return [as_bytes((wide / p.delta).round_().add_(p.zero_point).clamp_(0, p.high), p) for p in params]
    planes = [2 if p.is_wide else 1 for p in params]
    out = torch.empty(sum(planes), *channels_at_the_end(x).shape, dtype=torch.uint8)
    native.call("quantize", x, x.dtype == torch.bfloat16, *rows, params, len(params), out)
    out = out.movedim(-1, 2) if x.ndim == 4 else out
    return [part if len(part) > 1 else part[0] for part in out.split(planes)]


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x) for x [..., C], in x's dtype."""
    kernels = gpu_kernels(x, norm)
    if kernels is not None and x.shape[-1] <= kernels.MOST and x.dtype != torch.float32:
        return kernels.layer_norm(norm, x)
    if not has_kernel(x, norm):
        return norm(x) if x.dtype == torch.float32 else in_float32(norm, x).to(x.dtype)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    native.call(
        "layer_norm", x, x.dtype == torch.bfloat16, x.numel() // width, width, norm.weight, norm.bias, norm.eps, out
    )
    return out


def group_norm(
    norm: nn.GroupNorm, x: Tensor, params: Params, *, added: Tensor | None = None, silu: bool = False
) -> Any:
    """Return the codes of norm(x + added), or of SiLU of it.

    x: [B, C, *spatial]. added: float32 [B, C], or None for nothing.
    """
    if isinstance(params, DynamicParams):
        return dynamic_ops.group_norm(norm, x, params, added=added, silu=silu)
    kernels = gpu_kernels(x, norm)
    if kernels is not None and x.ndim == 4 and x.shape[1] <= kernels.MOST and not params.is_wide:
        return kernels.group_norm(norm, x, params, added, silu)
    if not has_kernel(x, norm) or x.ndim != 4 or x.numel() == 0:
        return quantize(group_norm_by_torch(norm, x, added, silu), params)[0]
    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    slices = max(1, math.ceil(size / SLICE))
    sums = torch.empty(samples * slices * 2 * channels)
    lines = torch.empty(samples * 2 * channels)
    out = empty_codes(x.permute(0, 2, 3, 1).shape, params)
    added = None if added is None else added.float().contiguous()
    native.call(
        "group_norm", x, x.dtype == torch.bfloat16, samples, size, channels, added, norm.num_groups, norm.weight,
        norm.bias, norm.eps, silu, [params], slices, sums, lines, out
    )  # fmt: skip
    return out.movedim(-1, -3)


def geglu(x: Tensor, params: Params) -> Codes:
    """Return the codes [..., n] of value * gelu(gate) for x = [value, gate], [..., 2 n]."""
    if isinstance(params, DynamicParams):
        return dynamic_ops.geglu(x, params)
    kernels = gpu_kernels(x)
    if kernels is not None and not params.is_wide:
        return kernels.geglu(x, params)
    if not has_kernel(x):
        value, gate = x.chunk(2, dim=-1)
        return quantize(value * F.gelu(gate), params)[0]
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = empty_codes([*x.shape[:-1], width], params)
    native.call("geglu", x, x.dtype == torch.bfloat16, x.numel() // (2 * width), width, [params], out)
    return out


Three = tuple[QuantParams, QuantParams, QuantParams]


@dataclass(frozen=True, kw_only=True)
class SoftmaxParams:
    """The quantizer of a softmax: code = clamp(round(p / delta), 0, high) for a probability p. high: 2^bits - 1."""

    delta: float
    high: int


FREE_RANGE = QuantParams(delta=1.0, zero_point=0, high=255)  # where the kernel quantizes nothing
FREE = SoftmaxParams(delta=1 / 65535, high=65535)  # what the kernel computes with at least


def attention(
    codes: tuple[Tensor, Tensor, Tensor],
    inputs: Three,
    heads: int,
    output: Params,
    dtype: torch.dtype,
    *,
    softmax: SoftmaxParams = FREE,
    mask: Tensor | None = None,
) -> Any:
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
    q, k, v = (numbers(each, params, unit_of(params, dtype), dtype) for each, params in zip(codes, inputs, strict=True))
    return attention_of_numbers((q, k, v), inputs, heads, output, mask=mask)


def attention_of_numbers(
    operands: tuple[Tensor, Tensor, Tensor], inputs: Three, heads: int, output: Params, *, mask: Tensor | None = None
) -> Codes:
    """Return what `attention` does by PyTorch, of q, k and v as `numbers` returns them with `unit_of`."""
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in operands)
    units = [unit_of(params, q.dtype) for params in inputs]
    scale = inputs[0].delta / units[0] * inputs[1].delta / units[1] * q.shape[-1] ** -0.5
    seen = None if mask is None else (mask if mask.dtype == torch.bool else mask.to(q.dtype))[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return _quantize_multiples(out.transpose(1, 2).flatten(2), output, inputs[2].delta / units[2])


def unit_of(params: QuantParams, dtype: torch.dtype) -> float:
    """Return what c - Z is multiplied by for PyTorch's attention.

    It is a whole number of 9 bits, which bfloat16 and float16 hold exactly. In float16 sums of products could overflow,
    so that it is multiplied by the step.
    """
    return params.delta if dtype == torch.float16 else 1.0


def numbers(codes: Tensor, params: QuantParams, step: float, dtype: torch.dtype) -> Tensor:
    """Return (c - Z) step of codes, in `dtype`."""
    if has_triton(codes.device) and codes.numel():
        from qdiff.engine.backends import triton_elementwise

        return triton_elementwise.numbers(codes, params.zero_point, step, dtype)
    return ((unsigned(codes).float() - params.zero_point) * step).to(dtype)


def _quantize_multiples(x: Tensor, params: Params, step: float) -> Codes:
    """Return the codes of x * step."""
    if isinstance(params, DynamicParams):
        return dynamic_ops.quantize(x, params).scaled(step)
    return quantize(x, _of_multiples(params, step))[0]


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
    output: Params,
    softmax: SoftmaxParams,
    mask: Tensor | None,
) -> Codes:
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
    # A dynamic range needs all heads of a token: the kernel writes numbers, which are quantized afterwards.
    dynamic, step = isinstance(output, DynamicParams), inputs[2].delta
    out = torch.empty(q.shape) if dynamic else empty_codes(q.shape, output)
    params = FREE_RANGE if isinstance(output, DynamicParams) else _of_multiples(output, step)
    native.call(
        "attention", q, k, v, seen, bias, batch, heads, queries, *sizes, scale, inputs[0].zero_point,
        inputs[2].zero_point, softmax.delta, softmax.high, [params], workspace,
        *((None, out) if dynamic else (out, None))
    )  # fmt: skip
    return _quantize_multiples(out, output, step) if dynamic else out


def fuses(x: Tensor) -> bool:
    """Return whether features like x go through the operations of this module: in float32 with our kernels only."""
    return x.dtype != torch.float32 or has_kernel(x)
