"""The numbers of a quantizer of bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantParams:
    """How a number x becomes a code of at most 8 bits: clamp(round(x / delta) + zero_point, 0, high).

    delta: above 0. zero_point: whole; it may lie outside of the codes. high: 2^bits - 1, at most 255.
    """

    delta: float
    zero_point: int
    high: int

    def __post_init__(self):
        if not self.delta > 0 or not 1 <= self.high <= 255:
            raise ValueError(f"{self} is no quantizer of bytes: delta must be above 0, and high in 1..255")
