"""The parameters of a quantizer whose codes are bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantParams:
    """The parameters of code = clamp(round(x / delta) + zero_point, 0, high), of at most 8 bits.

    delta: above 0. zero_point: may lie outside of 0..high. high: 2^bits - 1, in 1..255. Raises ValueError for others.
    """

    delta: float
    zero_point: int
    high: int

    def __post_init__(self):
        if not self.delta > 0 or not 1 <= self.high <= 255:
            raise ValueError(f"{self} is no quantizer of bytes: delta must be above 0, and high in 1..255")
