"""A score, a set of scores, and how both are written: as cells of a table and as plain values."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score of a set of pictures.

    name: without that of the features. value: inf for the PSNR of equal pictures. n: number of pictures, or of pairs.
    better: "higher" or "lower". low, high: 95% interval, None where there is none. spread: standard deviation over
    KID's subsets or the Inception Score's splits, which is no interval. replicates: of the jackknife, the score without
    each tenth of the pictures. Rows of the same prompts and seeds leave out the same pictures.
    """

    name: str
    value: float
    n: int
    better: str
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    replicates: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which knows no infinity: an infinite value or upper bound becomes None."""
        plain = asdict(self)
        for name in ("value", "high"):
            plain[name] = None if plain[name] == math.inf else plain[name]
        return plain


@dataclass(kw_only=True)
class Scores:
    """All scores of a set.

    by_key: in the order of the table. notes: a line each. curve: the (number of pictures, FID) that were extrapolated.
    """

    by_key: dict[str, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)


def number_text(value: float) -> str:
    """Return four significant digits; 0 for a value below what rounding and sampling leave of zero."""
    return f"{0.0 if abs(value) < 5e-5 else value:.4g}"


def cell(score: Score) -> str:
    """Return the value with its interval in brackets, or with its spread behind +-."""
    text = number_text(score.value)
    if score.low is not None and score.high is not None:
        return f"{text} [{number_text(score.low)}, {number_text(score.high)}]"
    return text if score.spread is None else f"{text} +- {number_text(score.spread)}"
