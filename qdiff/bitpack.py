"""Pack integer codes of 2 to 16 bits into bytes, and unpack them.

Each row (index of dimension 0) is packed by itself. For widths below 8, eight codes c0..c7 of b bits fill b bytes,
the first code in the lowest bits:

    b = 4:   byte 0 = c1 c0    byte 1 = c3 c2    ...          (high bits left)
    b = 3:   bytes 2,1,0 = c7 c6 c5 c4 c3 c2 c1 c0

A row whose length is no multiple of 8 codes is padded with zeros. Codes of 8 bits are bytes; wider ones take two bytes
each, the low byte first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**17  # bytes that are unpacked at a time, which stay in the cache of a core


def packed_bytes(shape: Sequence[int], n_bits: int) -> int:
    """Return how many bytes one packed row takes, for codes of `shape` [rows, ...]."""
    codes = math.prod(shape[1:])
    if n_bits == 8:
        return codes
    return math.ceil(codes / 8) * n_bits if n_bits < 8 else 2 * codes


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack codes [rows, ...] of any dtype, whole numbers in 0..2^n_bits - 1, into uint8 [rows, bytes]."""
    rows = codes.reshape(codes.shape[0], -1)
    if n_bits == 8:
        return rows.to(torch.uint8)
    if n_bits > 8:
        wide = rows.to(torch.int32)
        return torch.stack([wide & 255, wide >> 8], dim=-1).to(torch.uint8).flatten(1)
    rows = torch.nn.functional.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8))
    octets = rows.reshape(len(rows), -1, 8)
    word = torch.zeros(octets.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= octets[..., i].long() << (n_bits * i)
    return torch.stack([(word >> (8 * j)) & 255 for j in range(n_bits)], dim=-1).to(torch.uint8).flatten(1)


def unpack(packed: Tensor, shape: Sequence[int], n_bits: int) -> Tensor:
    """Undo `pack`: return the codes of `shape` in uint8 [rows, bytes], as uint8, or as int32 if n_bits is above 8."""
    rows, count = shape[0], math.prod(shape[1:])
    if n_bits == 8:
        return packed.reshape(tuple(shape))
    if n_bits > 8:
        pairs = packed.reshape(rows, count, 2).to(torch.int32)
        return (pairs[..., 0] | pairs[..., 1] << 8).reshape(tuple(shape))
    if n_bits == 4:  # the most common width takes a shorter way
        return _of_halves(packed).view(rows, -1)[:, :count].reshape(tuple(shape))
    octets = packed.reshape(rows, -1, n_bits)
    word = torch.zeros(octets.shape[:2], dtype=torch.int64, device=packed.device)
    for j in range(n_bits):
        word |= octets[..., j].long() << (8 * j)
    codes = torch.stack([(word >> (n_bits * i)) & (2**n_bits - 1) for i in range(8)], dim=-1).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count].reshape(tuple(shape))


def _of_halves(packed: Tensor) -> Tensor:
    """Return the two codes of 4 bits in each byte, as bytes: the lower one comes first."""
    pairs = torch.empty(packed.shape, dtype=torch.int16, device=packed.device)
    size = BLOCK if packed.device.type == "cpu" else max(packed.numel(), 1)
    for pair, both in zip(pairs.view(-1).split(size), packed.reshape(-1).split(size), strict=True):
        pair.copy_(both)
        pair |= pair << 4  # digits 00hl become 0hxl
        pair &= 0x0F0F  # and then 0h0l, whose low byte is the first one in memory
    return pairs.view(torch.uint8)
