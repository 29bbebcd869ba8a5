"""Notice NaN and infinity while a calibration learns, and name where they arose."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Return True if no value is NaN or infinite. A sum tells both, and takes one pass over the values.

    A sum that overflows float32 counts as infinite: squares of such values would be.
    """
    return bool(values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32).isfinite())


def check_error(error: float, what: str) -> float:
    """Return an error. Raise ValueError, which begins with `what`, if it is NaN or infinite."""
    if not math.isfinite(error):
        raise ValueError(f"{what} is {error}: numbers overflow")
    return error


@contextmanager
def named(place: str) -> Iterator[None]:
    """Begin the text of each ValueError within the block with `place`: a phase, a unit, a layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
