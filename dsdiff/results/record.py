"""The content of results.json: the rows of the table with their scores, and how they came about."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsdiff.benchmark.comparison import UNetFigures
from dsdiff.metrics.report import ScoringProtocol
from dsdiff.metrics.scores import Score
from dsdiff.options import DrawOptions
from dsdiff.results.picture_time import PictureTime
from dsdiff.results.table import Row


@dataclass(frozen=True, kw_only=True)
class Change:
    """By how many percent a row's FID is above the baseline's, with its 95% interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A row with its figures.

    n: number of pictures. features: whose the scores are, "" for Inception's. engine, precision: what computed the
    UNet. pictures: their folder, below that of the results. change: None for the baseline. picture: its time.
    """

    row: Row
    n: int
    features: str
    scores: Mapping[str, Score]
    notes: Sequence[str]
    protocol: ScoringProtocol
    engine: str
    precision: str
    unet: UNetFigures
    pictures: str
    change: Change | None
    picture: PictureTime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the replicates of the scores."""
        plain = {
            "title": self.row.title,
            "n": self.n,
            "features": self.features,
            "scores": {key: {**score.to_dict(), "replicates": []} for key, score in self.scores.items()},
            "notes": list(self.notes),
            "protocol": self.protocol.to_dict(),
            "engine": self.engine,
            "precision": self.precision,
            "unet": asdict(self.unet),
            "picture": None if self.picture is None else asdict(self.picture),
            "pictures": self.pictures,
            "change": None if self.change is None else asdict(self.change),
        }
        row = asdict(self.row)
        return {**row, "cache": str(row["cache"]) if isinstance(row["cache"], Path) else row["cache"], **plain}


@dataclass(frozen=True, kw_only=True)
class Results:
    """The table of results. drawing: the table's options. calibration: of the cali_ckpt, as its header has it.
    shown: indices of the prompts whose pictures are in the page. rows: the first is the baseline."""

    model: str
    machine: Mapping[str, Any]
    drawing: DrawOptions
    calibration: Mapping[str, Any]
    batch_size: int
    seed: int
    repeats: int
    versions: Mapping[str, str]
    shown: Sequence[int]
    prompts: Sequence[str]
    rows: list[RowResult] = field(default_factory=list)

    @property
    def drawn(self) -> dict[str, Any]:
        """The sampler, and the table's other options of drawing; defaults are absent."""
        plain = asdict(DrawOptions())
        return {
            name: value for name, value in asdict(self.drawing).items() if name == "sampler" or value != plain[name]
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "model": self.model,
            "machine": dict(self.machine),
            "drawing": self.drawn,
            "calibration": dict(self.calibration),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "repeats": self.repeats,
            "versions": dict(self.versions),
            "shown": list(self.shown),
            "prompts": list(self.prompts),
            "rows": [row.to_dict() for row in self.rows],
        }
