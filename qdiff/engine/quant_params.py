"""The parameters of quantizers whose codes are one byte or two, and codes with ranges of their own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QuantParams:
    """The parameters of code = clamp(round(x / delta) + zero_point, 0, high), of at most 16 bits.

    delta: above 0. zero_point: may lie outside of 0..high. high: 2^bits - 1, in 1..65535. Raises ValueError for others.
    Codes of more than 8 bits are stored as two tensors of bytes, the low and the high ones: uint8 [2, ...].
    """

    delta: float
    zero_point: int
    high: int

    def __post_init__(self):
        if not self.delta > 0 or not 1 <= self.high <= 65535:
            raise ValueError(f"{self} is no quantizer of bytes: delta must be above 0, and high in 1..65535")

    @property
    def is_wide(self) -> bool:
        """True if a code takes two bytes."""
        return self.high > 255

    def halves(self) -> "tuple[QuantParams, QuantParams]":
        """Return the parameters of the low and the high bytes of wide codes, whose values add up to that of the code.

        With codes c = 256 h + l and Z = 256 Z_h + Z_l, (c - Z) D = (l - Z_l) D + (h - Z_h) 256 D.
        """
        low = QuantParams(delta=self.delta, zero_point=self.zero_point % 256, high=255)
        return low, QuantParams(delta=256 * self.delta, zero_point=self.zero_point // 256, high=self.high // 256)


@dataclass(frozen=True, kw_only=True)
class DynamicParams:
    """How the codes of a tensor are made whose ranges are taken from it: see `qdiff.quantizers.DynamicQuantizer`.

    high: 2^bits - 1. symmetric: (high + 1) / 2 stands for 0. per: "token" for a range of each row of the last
    dimension, "sample" for one of each entry of the first. padding: for samples, how many pixels that stand for 0 are
    put at both ends of each dimension of space; () for none.
    """

    high: int
    symmetric: bool
    per: str
    padding: tuple[int, ...] = ()

    @property
    def is_wide(self) -> bool:
        """True if a code takes two bytes."""
        return self.high > 255


@dataclass(frozen=True, eq=False)
class DynamicCodes:
    """Codes with the ranges that were taken from what they stand for.

    codes: uint8, padded, [2, ...] if they are wide. ranges: float32 [tokens or samples, 2], the step and the zero point
    of each. params: how they were made.
    """

    codes: Tensor
    ranges: Tensor
    params: DynamicParams

    @property
    def shape(self) -> torch.Size:
        """The shape of what the codes stand for, with its padding."""
        return self.codes.shape[1:] if self.params.is_wide else self.codes.shape

    @property
    def rows(self) -> int:
        """The number of tokens, or of pixels."""
        return self.shape.numel() // (self.shape[-1 if self.params.per == "token" else 1] or 1)

    def split(self, tokens: int) -> "list[DynamicCodes]":
        """Return the codes of so many tokens at a time, each [tokens, C] or [2, tokens, C]."""
        first = 1 if self.params.is_wide else 0
        parts = self.codes.flatten(first, -2).split(tokens, dim=first)
        return [
            DynamicCodes(codes, ranges, self.params)
            for codes, ranges in zip(parts, self.ranges.split(tokens), strict=True)
        ]

    def pixels(self, count: int) -> "list[DynamicCodes]":
        """Return the codes of so many pixels at a time, each [count, C] or [2, count, C], none of two samples.

        A piece has one range, that of its sample. The map must not be padded.
        """
        first = 1 if self.params.is_wide else 0
        rows, params = self.codes.movedim(-3, -1).flatten(-3, -2), replace(self.params, per="token", padding=())
        return [
            DynamicCodes(piece, ranges, params)
            for sample, ranges in zip(rows.unbind(first), self.ranges.split(1), strict=True)
            for piece in sample.split(count, dim=first)
        ]

    def scaled(self, factor: float) -> "DynamicCodes":
        """Return the codes of numbers `factor` times as large."""
        steps, zero_points = self.ranges.unbind(1)
        return DynamicCodes(self.codes, torch.stack([steps * factor, zero_points], dim=1), self.params)

    def columns(self, dims: int) -> tuple[Tensor, Tensor]:
        """Return steps and zero points, broadcastable to these tokens or samples in a tensor of `dims` dimensions."""
        shape = (*self.shape[:-1], 1) if self.params.per == "token" else (-1, *[1] * (dims - 1))
        steps, zero_points = self.ranges.unbind(1)
        return steps.reshape(shape), zero_points.reshape(shape)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the codes stand for, without padding."""
        codes = whole_codes(self.codes, self.params)
        for dim, pad in enumerate(self.params.padding, start=2):
            codes = codes.narrow(dim, pad, codes.shape[dim] - 2 * pad)
        steps, zero_points = self.columns(codes.ndim)
        return ((codes - zero_points) * steps).to(dtype)


Params = QuantParams | DynamicParams
Codes = Tensor | DynamicCodes  # those of QuantParams, and those of DynamicParams


def signed(codes: Tensor) -> Tensor:
    """Return codes of one byte as our kernels for GPUs take them, int8: less 128. codes: uint8, or int8 already."""
    return codes if codes.dtype == torch.int8 else (codes ^ 128).view(torch.int8)


def unsigned(codes: Tensor) -> Tensor:
    """Return codes as uint8. codes: uint8 already, or int8 as `signed` returns them."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 128


def whole_codes(codes: Tensor, params: Params) -> Tensor:
    """Return codes as float32 numbers, which hold them exactly. codes: [2, ...] if they are wide."""
    codes = unsigned(codes)
    return codes[0].float().add_(codes[1].float(), alpha=256) if params.is_wide else codes.float()
