"""The report of a scoring: its protocol and scores as lines, as a table and as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from dsdiff.environment import versions
from dsdiff.images.sources import size_text
from dsdiff.metrics.pair_scores import TITLES as PAIRED
from dsdiff.metrics.scores import Scores, cell

PACKAGES = ("torch-fidelity", "torchmetrics", "torchvision", "numpy", "pillow")
Facts = Mapping[str, Any]  # plain values, as they are stored


@dataclass(frozen=True, kw_only=True)
class ScoringProtocol:
    """The protocol of a scoring: what was compared, and how.

    pictures, reference, paired: the sets, by their facts. resize: how they came to one size, in words. features: the
    extractor, by its facts. seed: of intervals and extrapolation. kid_and_is_seed: of KID's subsets and the Inception
    Score's splits. None means that the comparison had no such part.
    """

    pictures: Facts
    reference: Facts | None
    paired: Facts | None
    resize: str
    features: Facts | None
    seed: int
    kid_and_is_seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def lines(self) -> list[str]:
        """Return the protocol in words, a line for each part."""
        lines = []
        for part in ("pictures", "reference", "paired"):
            facts = getattr(self, part)
            if facts is not None:
                size = size_text(facts["size"]) if "size" in facts else "size unknown"
                lines.append(f"{part}: {facts['source']}, {facts['n'] or 'nobody knows how many'} pictures, {size}")
        lines.append(f"resize: {self.resize}")
        if self.features is not None:
            network = f"{self.features['network']} of torch-fidelity {version('torch-fidelity')}"
            weights = f"weights {self.features['weights_sha256'][:16]}"
            lines.append(f"features: {network}, {self.features['dimensions']} dimensions, {weights}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Report:
    """The scores of a set of pictures.

    source: as it was given. label: the text behind the names of scores of sets, which says whose features they are of.
    """

    source: str
    protocol: ScoringProtocol
    scores: Scores
    label: str

    def titles(self) -> dict[str, str]:
        """Return the name of each score with that of its features; scores of pairs have none."""
        return {key: score.name + ("" if key in PAIRED else self.label) for key, score in self.scores.by_key.items()}

    def table(self) -> str:
        """Return a line for each score: value, 95% interval, number of pictures or pairs, and which way is better."""
        titles = self.titles()
        lines = [("score", "value [95% interval] or +- spread", "n", "better")]
        lines += [(titles[key], cell(score), str(score.n), score.better) for key, score in self.scores.by_key.items()]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def markdown(self, name: str | None = None) -> str:
        """Return a table of one row, which is called `name` (None: the source)."""
        escaped = " ".join((name or self.source).split()).replace("|", "\\|")
        head = ["", *self.titles().values()]
        row = [escaped, *(cell(score) for score in self.scores.by_key.values())]
        lines = (head, ["---"] * len(head), row)
        return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)

    def to_dict(self, name: str | None = None) -> dict[str, Any]:
        """Return plain values for JSON. An infinite score is None there, and a note says so."""
        titles = self.titles()
        return {
            "name": name or self.source,
            "scores": {key: {**score.to_dict(), "name": titles[key]} for key, score in self.scores.by_key.items()},
            "fid_curve": self.scores.curve,
            "notes": self.scores.notes,
            "protocol": self.protocol.to_dict(),
            "versions": versions() | {package: version(package) for package in PACKAGES},
        }
