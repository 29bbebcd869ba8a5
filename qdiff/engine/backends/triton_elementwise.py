"""Triton kernels that quantize, and norms that end in codes: `fused_ops` on NVIDIA GPUs.

Numbers are float32 inside, in the order of the C kernels' and the quantizers' arithmetic: divisions are exact, ties go
to even. Codes are signed, int8 (see `quant_params.signed`). Sums are added in a fixed order, so results do not change
from run to run.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qdiff.engine.backends.triton_kernels import kernel, rounded, signed_codes
from qdiff.engine.features import channels_at_the_end, evenly_spaced, on_device
from qdiff.engine.quant_params import QuantParams, signed

BLOCK = 2048  # numbers that a program of a plain pass handles
LONGEST = 2**31 - BLOCK  # numbers whose places fit into 32 bits
CHUNK = 32  # pixels whose sums one program of a group norm computes
MOST = 4096  # channels of a group norm or a layer norm


@kernel
def _places(BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Return the places of the numbers of this program. LONG: whether 32 bits are too few for them."""
    block = tl.program_id(0).to(tl.int64) if LONG else tl.program_id(0)
    return block * BLOCK + tl.arange(0, BLOCK)


@kernel
def _code(x, delta, zero_point, high):
    return signed_codes(rounded(tl.math.div_rn(x, delta)) + zero_point, high)


@kernel
def _quantize(
    x_at, out_at, width, stride, count, d0, z0, h0, d1, z1, h1, d2, z2, h2, N: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write N lots of codes [count] of rows of `width` numbers, `stride` apart. EVEN: the rows follow each other."""
    i = _places(BLOCK, LONG)
    mask = i < count
    at = i if EVEN else i // width * stride + i % width
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at + i, _code(x, d0, z0, h0), mask=mask)
    if N > 1:
        tl.store(out_at + count + i, _code(x, d1, z1, h1), mask=mask)
    if N > 2:
        tl.store(out_at + 2 * count + i, _code(x, d2, z2, h2), mask=mask)


def quantize(x: Tensor, params: Sequence[QuantParams]) -> list[Tensor]:
    """Return the codes of x by each of params, of at most 8 bits each. Feature maps come in channels_last order.

    Equal params share a tensor.
    """
    if len(unique := list(dict.fromkeys(params))) < len(params):
        made = dict(zip(unique, quantize(x, unique), strict=True))
        return [made[each] for each in params]
    if x.ndim == 4 and evenly_spaced(x) is None:
        x = x.contiguous(memory_format=torch.channels_last)
    rows = evenly_spaced(x)
    if rows is None:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1], x.shape[-1], x.shape[-1]
    _, width, stride = rows
    shape, count, codes = channels_at_the_end(x).shape, x.numel(), []
    for start in range(0, len(params), 3):
        some = params[start : start + 3]
        out = torch.empty(len(some), *shape, dtype=torch.int8, device=x.device)
        numbers = [(p.delta, float(p.zero_point), float(p.high)) for p in [*some, some[0], some[0]][:3]]
        with on_device(x):
            _quantize[(math.ceil(count / BLOCK),)](
                x, out, width, stride, count, *numbers[0], *numbers[1], *numbers[2], N=len(some),
                EVEN=width == stride, BLOCK=BLOCK, LONG=len(some) * count * stride // width >= LONGEST, num_warps=8,
            )  # fmt: skip
        codes += out.unbind(0)
    return [each.movedim(-1, 1) if x.ndim == 4 else each for each in codes]


@kernel
def _numbers(code_at, out_at, count, zero_point, step, BLOCK: tl.constexpr, LONG: tl.constexpr):
    i = _places(BLOCK, LONG)
    codes = tl.load(code_at + i, mask=i < count, other=0).to(tl.float32)
    tl.store(out_at + i, ((codes + 128.0 - zero_point) * step).to(out_at.dtype.element_ty), mask=i < count)


def numbers(codes: Tensor, zero_point: int, step: float, dtype: torch.dtype) -> Tensor:
    """Return (c - Z) step of codes, in `dtype`."""
    codes = signed(codes).contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if count := codes.numel():
        with on_device(codes):
            _numbers[(math.ceil(count / BLOCK),)](
                codes, out, count, float(zero_point), step, BLOCK=BLOCK, LONG=count >= LONGEST, num_warps=8
            )
    return out


@kernel
def _geglu(x_at, out_at, width, count, delta, zero_point, high, BLOCK: tl.constexpr, LONG: tl.constexpr):
    i = _places(BLOCK, LONG)
    at = i // width * 2 * width + i % width
    value = tl.load(x_at + at, mask=i < count, other=0.0).to(tl.float32)
    gate = tl.load(x_at + at + width, mask=i < count, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))
    tl.store(out_at + i, _code(y, delta, zero_point, high), mask=i < count)


def geglu(x: Tensor, params: QuantParams) -> Tensor:
    """Return the codes [..., n] of value * gelu(gate) for x = [value, gate], [..., 2 n]."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=torch.int8, device=x.device)
    count = out.numel()
    with on_device(x):
        _geglu[(math.ceil(count / BLOCK),)](
            x,
            out,
            width,
            count,
            params.delta,
            float(params.zero_point),
            float(params.high),
            BLOCK=BLOCK,
            LONG=2 * count >= LONGEST,
            num_warps=8,
        )
    return out


# --- norms -------------------------------------------------------------------------------------------------


@kernel
def _layer_norm(x_at, weight_at, bias_at, out_at, rows, C, eps, R: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, BC)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    scale = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    weight = tl.load(weight_at + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + c, mask=c < C, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_at + at, y.to(out_at.dtype.element_ty), mask=mask)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x) for x [..., C], in x's dtype."""
    x, width = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // width
    block = triton.next_power_of_2(width)
    each = max(1, 2048 // block)  # rows of a program
    with on_device(x):
        _layer_norm[(math.ceil(rows / each),)](
            x, norm.weight, norm.bias, out, rows, width, norm.eps, R=each, BC=block, num_warps=4
        )
    return out


@kernel
def _chunk_sums(x_at, means_at, squares_at, size, C, chunks, P: tl.constexpr, BC: tl.constexpr):
    """Write the mean of each channel in a chunk of P pixels of a sample, and the sum of squared distances from it."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    pixel = chunk * P + tl.arange(0, P)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (pixel < size)[:, None] & (c < C)[None, :]
    at = (sample * size + pixel).to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(P, size - chunk * P)
    centred = tl.where(mask, x - mean[None, :], 0.0)
    to = (sample * chunks + chunk) * C + c
    tl.store(means_at + to, mean, mask=c < C)
    tl.store(squares_at + to, tl.sum(centred * centred, axis=0), mask=c < C)


@kernel
def _group_lines(
    means_at, squares_at, added_at, weight_at, bias_at, lines_at, size, C, W, chunks, eps, P, stride,
    ADDED: tl.constexpr, NC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Write of each channel of a group the line a, b for which a x + b is the norm of x, or of x + added."""
    group, sample = tl.program_id(0), tl.program_id(1)
    w, chunk = tl.arange(0, BW), tl.arange(0, NC)
    c = group * W + w
    mask = (chunk < chunks)[:, None] & (w < W)[None, :]
    at = (sample * chunks + chunk)[:, None] * C + c[None, :]
    counts = tl.maximum(tl.minimum(P, size - chunk * P), 0).to(tl.float32)[:, None]
    means = tl.load(means_at + at, mask=mask, other=0.0)
    added = tl.zeros((BW,), dtype=tl.float32)
    if ADDED:
        added = tl.load(added_at + sample * stride + c, mask=w < W, other=0.0)
    means = means + added[None, :]
    count = size * W
    mean = tl.sum(tl.sum(tl.where(mask, means * counts, 0.0), axis=0), axis=0) / count
    apart = tl.where(mask, means - mean, 0.0)
    squares = tl.load(squares_at + at, mask=mask, other=0.0) + apart * apart * counts
    scale = tl.math.rsqrt(tl.sum(tl.sum(squares, axis=0), axis=0) / count + eps)
    weight = tl.load(weight_at + c, mask=w < W, other=0.0).to(tl.float32) * scale
    bias = tl.load(bias_at + c, mask=w < W, other=0.0).to(tl.float32) + (added - mean) * weight
    tl.store(lines_at + sample * 2 * C + c, weight, mask=w < W)
    tl.store(lines_at + sample * 2 * C + C + c, bias, mask=w < W)


@kernel
def _normed_codes(
    x_at, lines_at, out_at, size, C, delta, zero_point, high, SILU: tl.constexpr, P: tl.constexpr, BC: tl.constexpr
):
    """Write the codes of a x + b, or of SiLU of it, with the line a, b of each channel."""
    sample = tl.program_id(2)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (pixel < size)[:, None] & (c < C)[None, :]
    at = (sample * size + pixel).to(tl.int64)[:, None] * C + c[None, :]
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(lines_at + sample * 2 * C + c, mask=c < C, other=0.0)
    b = tl.load(lines_at + sample * 2 * C + C + c, mask=c < C, other=0.0)
    y = x * a[None, :] + b[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_at + at, _code(y, delta, zero_point, high), mask=mask)


def group_norm(norm: nn.GroupNorm, x: Tensor, params: QuantParams, added: Tensor | None, silu: bool) -> Tensor:
    """Return the codes of norm(x + added), or of SiLU of it. x: [B, C, H, W]. added: float32 [B, C], or None."""
    x = x.contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = x.shape
    size = height * width
    pixels = CHUNK
    while math.ceil(size / pixels) > 256:  # chunks that one program puts together
        pixels *= 2
    block = 64 if pixels <= CHUNK else 32
    while pixels * block > 8192:
        block //= 2
    chunks, across = math.ceil(size / pixels), math.ceil(channels / block)
    means, squares = torch.empty(2, samples, chunks, channels, device=x.device).unbind(0)
    lines = torch.empty(samples, 2, channels, device=x.device)
    out = torch.empty(samples, height, width, channels, dtype=torch.int8, device=x.device)
    added = None if added is None else added.float()
    if added is not None and added.stride(1) != 1:
        added = added.contiguous()
    wide = channels // norm.num_groups
    with on_device(x):
        _chunk_sums[(chunks, across, samples)](
            x, means, squares, size, channels, chunks, P=pixels, BC=block, num_warps=4
        )
        _group_lines[(norm.num_groups, samples)](
            means, squares, lines if added is None else added, norm.weight, norm.bias, lines, size, channels, wide,
            chunks, norm.eps, pixels, 0 if added is None else added.stride(0), ADDED=added is not None,
            NC=triton.next_power_of_2(chunks), BW=triton.next_power_of_2(wide), num_warps=4,
        )  # fmt: skip
        _normed_codes[(math.ceil(size / CHUNK), math.ceil(channels / 64), samples)](
            x, lines, out, size, channels, params.delta, float(params.zero_point), float(params.high), SILU=silu,
            P=CHUNK, BC=64, num_warps=4,
        )  # fmt: skip
    return out.movedim(-1, 1)
