"""The parameters of a quantizer whose codes are one byte or two."""

from dataclasses import dataclass


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
