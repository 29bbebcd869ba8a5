"""Triton kernels for products of int8 matrices and for int8 convolutions, with what follows the sums.

A convolution is an implicit product: for each place of its kernel, a program reads the rows of the feature map [B, H,
W, C] that the place meets. Rows beyond the map are read as zeros, and `shift` makes up for them. A product of matrices
is the case of one place and no map.

Where there are few tiles, several programs share one: each sums up a part of the inputs (`SPLIT`), and a second kernel
adds the parts. Sums are whole numbers of 32 bits, so that the result is the same.

With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from typing import Any

import triton
import triton.language as tl

# What follows the sums: floats, floats plus an addend, int8 codes, or the numbers that codes stand for.
FLOAT, PLUS, CODES, NUMBERS = 0, 1, 2, 3
kernel: Any = triton.jit  # whose types do not tell that a kernel takes num_warps


@kernel
def rounded(x):
    """Return x rounded to the nearest whole number, ties to even, for x of less than 2^21; others are clamped to it."""
    # 1.5 * 2^23: the sum with it has no digits after the point.
    x = tl.minimum(tl.maximum(x, -2097152.0), 2097152.0)
    return (x + 12582912.0) - 12582912.0


@kernel
def signed_codes(scaled, high):
    """Return whole numbers, clamped to 0..high, as signed codes: int8, less 128."""
    return (tl.minimum(tl.maximum(scaled, 0.0), high) - 128.0).to(tl.int32).to(tl.int8)


@kernel
def _finish(
    sums, n, at, mask, step_at, bias_at, addend_at, out_at, inverse, zero_point, high, unit, N, KIND: tl.constexpr
):
    """Multiply exact sums [BM, BN] by the steps of the outputs n [BN], add the bias, and store the results."""
    valid = n < N
    step = tl.load(step_at + n, mask=valid, other=0.0)
    bias = tl.load(bias_at + n, mask=valid, other=0.0)
    y = sums.to(tl.float32) * step[None, :] + bias[None, :]
    if KIND == 2:
        tl.store(out_at + at, signed_codes(rounded(y * inverse + zero_point), high), mask=mask)
    elif KIND == 3:
        codes = tl.minimum(tl.maximum(rounded(y * inverse + zero_point), 0.0), high)
        tl.store(out_at + at, ((codes - zero_point) * unit).to(out_at.dtype.element_ty), mask=mask)
    else:
        y = y.to(out_at.dtype.element_ty)
        if KIND == 1:  # rounded before the sum, as without fusion
            y = (y.to(tl.float32) + tl.load(addend_at + at, mask=mask, other=0.0).to(tl.float32)).to(y.dtype)
        tl.store(out_at + at, y, mask=mask)


@kernel
def _kind_of_border(y, x, H, W, SY, SX, PY, PX, KH, KW):
    """Return which row of `shift` belongs to outputs at (y, x): by how many rows and columns the kernel stands out."""
    top, bottom = tl.maximum(PY - y * SY, 0), tl.maximum(y * SY - PY + KH - H, 0)
    left, right = tl.maximum(PX - x * SX, 0), tl.maximum(x * SX - PX + KW - W, 0)
    return ((top * (PY + 1) + bottom) * (PX + 1) + left) * (PX + 1) + right


@kernel
def product(
    a_at, b_at, shift_at, step_at, bias_at, addend_at, out_at, parts_at, inverse, zero_point, high, unit,
    M, N, C, stride_a, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    MAP: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BM, BN] of the output [M, N].

    a: signed codes [M, C], or the map [B, H, W, C]; rows are `stride_a` apart. b: int8 [N, KH, KW, C]. MAP: whether it
    is a convolution. EVEN: whether BK divides C. parts: int32 [SPLIT, M, N] for SPLIT above 1.
    """
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    blocks = tl.cdiv(C, BK)  # of the channels, for each place of the kernel
    total = blocks * KH * KW
    if SPLIT > 1:
        each = tl.cdiv(total, SPLIT)
        first = tl.program_id(1) * each
        last = tl.minimum(first + each, total)
    else:
        first = 0
        last = total
    y, x, sample = m, m, m
    if MAP:
        x, y, sample = m % OW, (m // OW) % OH, m // (OW * OH)
    b_row = n.to(tl.int64) * (C * KH * KW)
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for i in range(first, last):
        place = i // blocks
        channel = (i - place * blocks) * BK
        if MAP:
            iy, ix = y * SY - PY + place // KW, x * SX - PX + place % KW
            inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W) & (m < M)
            row = ((sample * H + iy) * W + ix).to(tl.int64) * stride_a
        else:
            inside = m < M
            row = m.to(tl.int64) * stride_a
        a_offsets = row[:, None] + (channel + k)[None, :]
        b_offsets = b_row[None, :] + (place * C + channel + k)[:, None]
        if EVEN:
            a = tl.load(a_at + a_offsets, mask=inside[:, None], other=0)
            b = tl.load(b_at + b_offsets, mask=(n < N)[None, :], other=0)
        else:
            a = tl.load(a_at + a_offsets, mask=inside[:, None] & (channel + k < C)[None, :], other=0)
            b = tl.load(b_at + b_offsets, mask=(n < N)[None, :] & (channel + k < C)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT > 1:
        tl.store(parts_at + tl.program_id(1).to(tl.int64) * M * N + at, sums, mask=mask)
    else:
        if MAP and (PY > 0 or PX > 0):
            kind = _kind_of_border(y, x, H, W, SY, SX, PY, PX, KH, KW)
            sums += tl.load(shift_at + kind[:, None] * N + n[None, :], mask=mask, other=0)
        else:
            sums += tl.load(shift_at + n, mask=n < N, other=0)[None, :]
        _finish(sums, n, at, mask, step_at, bias_at, addend_at, out_at, inverse, zero_point, high, unit, N, KIND)


@kernel
def add_parts(
    parts_at, shift_at, step_at, bias_at, addend_at, out_at, inverse, zero_point, high, unit, M, N, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    MAP: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the parts [SPLIT, M, N] of a tile's sums, and finish it as `product` does."""
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for part in range(SPLIT):
        sums += tl.load(parts_at + part * M * N + at, mask=mask, other=0)
    if MAP and (PY > 0 or PX > 0):
        kind = _kind_of_border((m // OW) % OH, m % OW, H, W, SY, SX, PY, PX, KH, KW)
        sums += tl.load(shift_at + kind[:, None] * N + n[None, :], mask=mask, other=0)
    else:
        sums += tl.load(shift_at + n, mask=n < N, other=0)[None, :]
    _finish(sums, n, at, mask, step_at, bias_at, addend_at, out_at, inverse, zero_point, high, unit, N, KIND)


@kernel
def gated_product(
    a_at, b_at, shift_at, step_at, bias_at, out_at, delta, zero_point, high, M, N, C, stride_a,
    BF16: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BM, BN] of signed codes [M, N] of value * gelu(gate), for a product [M, 2 N] of [value, gate].

    a: signed codes [M, C]. b: int8 [2 N, C]. BF16: value and gate are rounded to bfloat16 first, else to float16.
    """
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_row, b_row = m.to(tl.int64) * stride_a, n.to(tl.int64) * C
    gates_at = b_at + N * C
    values = tl.zeros((BM, BN), dtype=tl.int32)
    gates = tl.zeros((BM, BN), dtype=tl.int32)
    for i in range(0, tl.cdiv(C, BK)):
        a_offsets = a_row[:, None] + (i * BK + k)[None, :]
        b_offsets = b_row[None, :] + (i * BK + k)[:, None]
        a_mask, b_mask = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            a_mask = a_mask & (i * BK + k < C)[None, :]
            b_mask = b_mask & (i * BK + k < C)[:, None]
        a = tl.load(a_at + a_offsets, mask=a_mask, other=0)
        value_weights = tl.load(b_at + b_offsets, mask=b_mask, other=0)
        gate_weights = tl.load(gates_at + b_offsets, mask=b_mask, other=0)
        values = tl.dot(a, value_weights, values, out_dtype=tl.int32)
        gates = tl.dot(a, gate_weights, gates, out_dtype=tl.int32)
    value = _numbers(values, n, shift_at, step_at, bias_at, N, BF16)
    gate = _numbers(gates, n, shift_at + N, step_at + N, bias_at + N, N, BF16)
    y = value * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))
    codes = signed_codes(rounded(tl.math.div_rn(y, delta)) + zero_point, high)
    tl.store(out_at + m.to(tl.int64)[:, None] * N + n[None, :], codes, mask=(m < M)[:, None] & (n < N)[None, :])


@kernel
def _numbers(sums, n, shift_at, step_at, bias_at, N, BF16: tl.constexpr):
    """Return the floats of exact sums, rounded to bfloat16 or float16, in float32."""
    valid = n < N
    sums += tl.load(shift_at + n, mask=valid, other=0)[None, :]
    step = tl.load(step_at + n, mask=valid, other=0.0)
    y = sums.to(tl.float32) * step[None, :] + tl.load(bias_at + n, mask=valid, other=0.0)[None, :]
    return y.to(tl.bfloat16).to(tl.float32) if BF16 else y.to(tl.float16).to(tl.float32)
