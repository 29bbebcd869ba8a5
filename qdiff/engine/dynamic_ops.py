"""Operations that end in codes whose ranges are taken from the numbers themselves, and rescaling of their products.

They are `fused_ops` for `DynamicParams`: our C kernels where they can run, else PyTorch. Ranges are taken in float32
from what is quantized. A norm knows the extremes of its output from those of its input, without a further pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import native
from qdiff.engine.features import SLICE, as_bytes, empty_codes, evenly_spaced, group_norm_by_torch, has_kernel
from qdiff.engine.quant_params import DynamicCodes, DynamicParams, QuantParams
from qdiff.quantizers import dynamic_range


def quantize(x: Tensor, params: DynamicParams) -> DynamicCodes:
    """Return the codes of x, those of DynamicQuantizer bit for bit. x: [..., C], or [B, C, *spatial] for samples."""
    rows = evenly_spaced(x) if has_kernel(x) else None
    if rows is None or (params.per == "sample" and x.ndim != 4):
        return _quantize_by_torch(x, params)
    kind, how = x.dtype == torch.bfloat16, (params.high, params.symmetric)
    if params.per == "token":
        ranges, out = torch.empty(rows[0], 2), empty_codes(x.shape, params)
        native.call("quantize_tokens", x, kind, *rows, *how, ranges, out)
        return DynamicCodes(out, ranges, params)
    samples, channels, height, width = x.shape
    ranges, out = _empty_map(x, params)
    extremes = torch.empty(samples * height * 2)
    native.call(
        "quantize_samples", x, kind, samples, height, width, channels, rows[2], *_padding(params), *how, extremes,
        ranges, out
    )  # fmt: skip
    return DynamicCodes(out.movedim(-1, -3), ranges, params)


def _quantize_by_torch(x: Tensor, params: DynamicParams) -> DynamicCodes:
    wide = x.float()
    dims = -1 if params.per == "token" else tuple(range(1, x.ndim))
    steps, zero_points = dynamic_range(
        wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True), params.high, params.symmetric
    )
    zero_points = zero_points + (params.high + 1) // 2 if params.symmetric else zero_points
    codes = (wide / steps).round_().add_(zero_points).clamp_(0, params.high)
    if any(params.padding):
        sizes = [size + 2 * pad for size, pad in zip(x.shape[2:], params.padding, strict=True)]
        inner = codes
        codes = zero_points.expand(*x.shape[:2], *sizes).clone(memory_format=torch.contiguous_format)
        space = [slice(pad, pad + size) for size, pad in zip(x.shape[2:], params.padding, strict=True)]
        codes[(slice(None), slice(None), *space)] = inner
    ranges = torch.stack([steps.flatten(), zero_points.flatten()], dim=1)
    return DynamicCodes(as_bytes(codes, params), ranges, params)


def group_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    params: DynamicParams,
    *,
    added: Tensor | None = None,
    silu: bool = False,
    gains: Tensor | None = None,
) -> DynamicCodes:
    """Return the codes of norm(x + added), or of SiLU of it; see `fused_ops.group_norm`.

    gains: float32 [B], by which x is multiplied first; only where kernels are. None for ones.
    """
    if not has_kernel(x, norm) or x.ndim != 4 or x.numel() == 0:
        return quantize(group_norm_by_torch(norm, x, added, silu), params)
    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    slices = max(1, math.ceil(height * width / SLICE))
    sums = torch.empty(samples * slices * 4 * channels)
    lines = torch.empty(samples * 2 * channels)
    ranges, out = _empty_map(x, params)
    added = None if added is None else added.float().contiguous()
    native.call(
        "group_norm_samples", x, x.dtype == torch.bfloat16, samples, height, width, channels, gains, added,
        norm.num_groups, norm.weight, norm.bias, norm.eps, silu, params.high, params.symmetric, *_padding(params),
        slices, sums, lines, ranges, out
    )  # fmt: skip
    return DynamicCodes(out.movedim(-1, -3), ranges, params)


def _padding(params: DynamicParams) -> tuple[int, ...]:
    return params.padding or (0, 0)


def _empty_map(x: Tensor, params: DynamicParams) -> tuple[Tensor, Tensor]:
    """Return uninitialised ranges, and codes in channels_last order, for samples like x [B, C, H, W]."""
    samples, channels, *sizes = x.shape
    sizes = [size + 2 * pad for size, pad in zip(sizes, _padding(params), strict=True)]
    return torch.empty(samples, 2), empty_codes([samples, *sizes, channels], params)


def geglu(x: Tensor, params: DynamicParams) -> DynamicCodes:
    """Return the codes [..., n] of value * gelu(gate) for x = [value, gate], [..., 2 n]."""
    if not has_kernel(x):
        value, gate = x.chunk(2, dim=-1)
        return quantize(value * F.gelu(gate), params)
    return _geglu(x.contiguous(), params, None, None, None)


def geglu_of_products(
    products: Tensor, codes: DynamicCodes, sums: Tensor, bias: Tensor, params: DynamicParams
) -> DynamicCodes:
    """Return what `geglu` does of a layer's output. The arguments are those of `rescale`; kernels must be there."""
    return _geglu(products.contiguous(), params, codes.ranges, sums, bias)


def _geglu(
    x: Tensor, params: DynamicParams, ranges_in: Tensor | None, sums: Tensor | None, bias: Tensor | None
) -> DynamicCodes:
    width, threads = x.shape[-1] // 2, torch.get_num_threads()
    rows = x.numel() // (2 * width)
    out, ranges = empty_codes([*x.shape[:-1], width], params), torch.empty(rows, 2)
    native.call(
        "geglu_tokens", x, x.dtype == torch.bfloat16, rows, width, ranges_in, sums, bias, params.high,
        params.symmetric, threads, torch.empty(threads * width), ranges, out
    )  # fmt: skip
    return DynamicCodes(out, ranges, params)


# --- products of codes -------------------------------------------------------------------------------------


def rescale(
    products: Tensor,
    codes: DynamicCodes,
    sums: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    plus: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return a layer's output (products - zero point * sums) * step + bias in `dtype`, plus `plus`.

    products: float32 d sum c (q - z), [..., O] of tokens or [B, O, *spatial] of samples. codes: those of the layer's
    input, with steps and zero points. sums: d sum (q - z) [O]. bias: [O]. plus: of the output's shape and dtype. out:
    where the output goes, contiguous; None for a new tensor.
    """
    rows = _rows(products, codes)
    if rows is None or dtype not in (torch.float32, torch.bfloat16):
        output = _rescale_by_torch(products, codes, sums, bias)
        output = (output if plus is None else output.add_(plus)).to(dtype)
        return output if out is None else out.copy_(output)
    order = torch.channels_last if products.ndim == 4 else torch.contiguous_format
    products = products.contiguous(memory_format=order)
    out = torch.empty_like(products, dtype=dtype) if out is None else out
    plus = None if plus is None else plus.contiguous(memory_format=order)
    native.call("rescale", products, *rows, sums, bias, plus, dtype == torch.bfloat16, out)
    return out


def rescale_to_codes(
    products: Tensor,
    codes: DynamicCodes,
    sums: Tensor,
    bias: Tensor,
    params: QuantParams,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the codes of a layer's output by `params`, of 8 bits at most. Other arguments are those of `rescale`."""
    rows = _rows(products, codes)
    if rows is None or products.ndim == 4:
        output = _rescale_by_torch(products, codes, sums, bias)
        made = (output / params.delta).round_().add_(params.zero_point).clamp_(0, params.high).to(torch.uint8)
        return made if out is None else out.copy_(made)
    products = products.contiguous()
    out = torch.empty_like(products, dtype=torch.uint8) if out is None else out
    native.call("rescale_to_codes", products, *rows, sums, bias, [params], out)
    return out


def _rows(products: Tensor, codes: DynamicCodes) -> tuple[int, int, Tensor, int] | None:
    """Return how the kernels see products: rows, their width, the ranges, and the rows of each; None if they cannot."""
    of_tokens = codes.params.per == "token"
    if not has_kernel(products) or products.numel() == 0 or not (of_tokens or products.ndim == 4):
        return None
    width = products.shape[-1 if of_tokens else 1]
    rows = products.numel() // width
    return rows, width, codes.ranges, rows // len(codes.ranges)


def _rescale_by_torch(products: Tensor, codes: DynamicCodes, sums: Tensor, bias: Tensor) -> Tensor:
    steps, zero_points = codes.columns(products.ndim)
    shape = (-1,) if codes.params.per == "token" else (-1, *[1] * (products.ndim - 2))
    return (products - zero_points * sums.view(shape)) * steps + bias.view(shape)
