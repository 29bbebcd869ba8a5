"""The figures of ways to draw, and which of them are on the frontier. Plain values for JSON, table and plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsdiff.benchmark.figures import Spread
from dsdiff.metrics.attributes import Share


@dataclass(frozen=True, kw_only=True)
class Eps:
    """The error of guided eps in one step. mse: mean over prompts and steps. error: its standard error over prompts.
    by_call: the mean over prompts, for each call of the UNet."""

    mse: float
    error: float
    by_call: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The PSNR to the pictures of the base, in dB.

    psnr: of the mean squared error over all pictures; None if all are equal. mean, error: the mean of per-picture PSNR
    with its standard error, over the `pairs` that are not equal; None for fewer than two.
    """

    psnr: float | None
    mean: float | None
    error: float | None
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Time:
    """The seconds of a call in this way and in that of the base, side by side, one value a repeat."""

    own: Sequence[float]
    base: Sequence[float]

    @property
    def speed(self) -> Spread:
        """The seconds of the base divided by its own, within each repeat."""
        return Spread.over([other / own for own, other in zip(self.own, self.base, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to draw with its figures; None for those that were not asked for. changes: what it does unlike the base."""

    name: str
    changes: Mapping[str, Any]
    eps: Eps | None = None
    pictures: Pictures | None = None
    attributes: Share | None = None
    time: Time | None = None

    @property
    def loss(self) -> float | None:
        """The loss that the frontier shows: the error of eps, or without that the negative PSNR."""
        if self.eps is not None:
            return self.eps.mse
        return None if self.pictures is None or self.pictures.psnr is None else -self.pictures.psnr


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The ways to draw with their figures.

    model: what draws, in words. time_of: what is timed. drawing: how the base is drawn, the options that are not the
    model's own. steps: of a picture. calls: of a measurement of time; None for the default. quality_of: the machine on
    which all but time was measured; None for the same one.
    """

    model: str
    time_of: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    drawing: Mapping[str, Any]
    n: int
    seed: int
    steps: int
    calls: int | None
    repeats: int
    rows: Sequence[Row]
    quality_of: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        best = frontier(self.rows)
        plain = asdict(self)
        for row, values in zip(self.rows, plain["rows"], strict=True):
            values["speed"] = None if row.time is None else asdict(row.time.speed)
            values["on_frontier"] = row.name in best
        return plain


def frontier(rows: Sequence[Row]) -> list[str]:
    """Return the names of the rows that no other row beats in both time and loss, from slow to fast.

    Empty where one of the two was not measured.
    """
    both = [
        (row.time.speed.median, row.loss, row.name) for row in rows if row.time is not None and row.loss is not None
    ]
    best: list[str] = []
    least = float("inf")
    for _, loss, name in sorted(both, key=lambda each: (-each[0], each[1])):
        if loss < least:
            best.insert(0, name)
            least = loss
    return best
