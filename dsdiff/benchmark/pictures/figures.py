"""The figures of whole pictures, as plain values for JSON, tables and the plot."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.options import OPENVINO_INT8, Draw
from dsdiff.benchmark.pictures.request import PHASES, PictureTold


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to make a picture: an engine or a peer, the share of tokens it merges, and how it is drawn.

    steps: the steps of the whole picture, which some samplers round up. measured: how many of them are taken.
    """

    name: str
    ratio: float
    draw: Draw
    steps: int
    measured: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture: the seconds of each of PHASES, with all steps, and the most memory of its process."""

    phases: dict[str, float]
    peak_bytes: int | None
    facts: str

    @property
    def total(self) -> float:
        """The seconds from the start of the process to the PNG on the disk, with all steps."""
        return sum(self.phases.values())


@dataclass(kw_only=True)
class RowMeasured:
    """The pictures of a row, one a repeat. file_bytes: of all files that it is drawn from."""

    file_bytes: int
    drawn: list[Drawn] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """The figures of a row.

    sampler, steps, scale, tiny, measured: see Draw and Row. phases: median seconds by name. total: seconds of a
    picture. speedup, speedup_openvino: how many times as fast as float32 and as OpenVINO's int8, both without merging
    and drawn in the same way, within a repeat; None where those were not measured. peak_bytes: the median.
    """

    name: str
    ratio: float
    sampler: str
    steps: int
    scale: float | None
    tiny: bool
    measured: int
    phases: dict[str, float]
    total: Spread
    total_by_repeat: list[float]
    speedup: Spread | None
    speedup_openvino: Spread | None
    peak_bytes: float | None
    file_bytes: int
    facts: str


@dataclass(frozen=True, kw_only=True)
class PictureReport:
    """The results of a benchmark of whole pictures.

    model: a sentence on it. size: width and height of the pictures. machine: see `dsdiff.environment.machine`.
    left_out: the reasons, by name of engine or peer.
    """

    model: str
    size: tuple[int, int]
    machine: Mapping[str, Any]
    repeats: int
    rows: list[RowFigures]
    left_out: dict[str, str]


def drawn_of(told: PictureTold, begin: float, steps: int) -> Drawn:
    """Return the phases of a picture, in seconds.

    begin: the time of day when its process began. steps: those of the whole picture, see `seconds_of_steps`.
    """
    phases = {"start": told.ready - begin, **told.phases, "steps": seconds_of_steps(told.steps, steps)}
    return Drawn(phases={phase: phases[phase] for phase in PHASES}, peak_bytes=told.peak_bytes, facts=told.facts)


def seconds_of_steps(measured: Sequence[float], steps: int) -> float:
    """Return the seconds of a whole picture's steps.

    If fewer were measured, each missing one counts as the median of all but the first, which takes longer. Raises
    ValueError if fewer than two of several steps were measured.
    """
    missing = max(steps - len(measured), 0)
    if missing and len(measured) < 2:
        raise ValueError(f"{len(measured)} of {steps} steps were measured: 2 are needed")
    return sum(measured) + (missing * statistics.median(measured[1:]) if missing else 0.0)


def figures_of(found: Mapping[Row, RowMeasured]) -> list[RowFigures]:
    """Return the figures of each row."""
    return [_figures(found, row, measured) for row, measured in found.items()]


def _figures(found: Mapping[Row, RowMeasured], row: Row, measured: RowMeasured) -> RowFigures:
    totals = [drawn.total for drawn in measured.drawn]
    peaks = [drawn.peak_bytes for drawn in measured.drawn if drawn.peak_bytes is not None]
    return RowFigures(
        name=row.name,
        ratio=row.ratio,
        sampler=row.draw.sampler,
        steps=row.steps,
        scale=row.draw.scale,
        tiny=row.draw.tiny,
        measured=row.measured,
        phases={phase: statistics.median(drawn.phases[phase] for drawn in measured.drawn) for phase in PHASES},
        total=Spread.over(totals),
        total_by_repeat=totals,
        speedup=_speedup(found, row, totals, ("float32",)),
        speedup_openvino=_speedup(found, row, totals, OPENVINO_INT8),
        peak_bytes=statistics.median(peaks) if peaks else None,
        file_bytes=measured.file_bytes,
        facts=measured.drawn[-1].facts,
    )


def _speedup(
    found: Mapping[Row, RowMeasured], row: Row, totals: Sequence[float], names: Sequence[str]
) -> Spread | None:
    """Return the totals of the fastest of `names`, without merging, divided by these."""
    speedups = [
        Spread.over([theirs.total / own for theirs, own in zip(measured.drawn, totals, strict=True)])
        for other, measured in found.items()
        if other.name in names and not other.ratio and other.draw == row.draw
    ]
    return min(speedups, key=lambda each: each.median, default=None)
