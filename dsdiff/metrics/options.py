"""The options of scoring: what pictures are compared with, and how. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from dsdiff.checks import check_choice, check_whole
from dsdiff.images.sources import RESIZES, is_imagenet

EXTRACTORS = ("inception", "shapes")
STATISTICS = (".npz", ".safetensors")  # how the names of statistics files end


def is_statistics(source: str | None) -> bool:
    """Return whether a source is named like a statistics file."""
    return source is not None and Path(source).suffix in STATISTICS and not Path(source).is_dir()


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How to score a set of pictures.

    reference: the source of a set of real pictures, or a statistics file. None gives no scores of sets.
    paired: a folder with pictures of the same prompts and seeds. None gives no scores of pairs.
    n, reference_n: the number of pictures to take, from the first on. None takes all.
    per_class: the number of pictures per class of ImageNet. None is 5.
    resize: how pictures are brought to one size, one of RESIZES.
    size: the side of that size in pixels. None takes the size of the pictures that are scored.
    features: whose features to use, one of EXTRACTORS. None takes what the reference suggests.
    inception_weights, reader: files with the networks' weights. None takes the usual ones.
    clip: a folder with a CLIP model; shapes is the embedded model's own. None takes the one in Hugging Face's cache.
    resamples: the number of bootstrap resamples.
    seed: the seed of intervals and of the extrapolation.
    batch_size: the number of pictures per batch.
    device: a name for `choose_device`: auto, cpu, cuda or cuda:N.
    cache: the folder that keeps features. None keeps none.
    save_stats: the file to write the statistics of the pictures to.
    Raises ValueError for a value that cannot be.
    """

    reference: str | None = None
    paired: Path | None = None
    n: int | None = None
    reference_n: int | None = None
    per_class: int | None = None
    resize: str = "none"
    size: int | None = None
    features: str | None = None
    inception_weights: Path | None = None
    reader: Path | None = None
    clip: str | None = None
    resamples: int = 2000
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"
    cache: Path | None = None
    save_stats: Path | None = None

    def __post_init__(self) -> None:
        least = {"n": 2, "reference_n": 2, "per_class": 1, "size": 8, "resamples": 100, "seed": 0, "batch_size": 1}
        for name, low in least.items():
            check_whole(name, getattr(self, name), low, optional=True)
        check_choice("resize", self.resize, RESIZES)
        check_choice("features", self.features, EXTRACTORS, optional=True)
        if self.size is not None and self.resize == "none":
            raise ValueError("with resize none no picture changes, so size has no effect: leave it out")
        if self.save_stats is not None and self.save_stats.suffix not in STATISTICS:
            raise ValueError(f"statistics {str(self.save_stats)!r}: the name must end in {' or '.join(STATISTICS)}")

    @property
    def needs_features(self) -> bool:
        """True if a network has to see the pictures."""
        return self.reference is not None or self.save_stats is not None

    def check_for(self, pictures: str) -> None:
        """Raise ValueError if the source `pictures` cannot be scored like this, or an option would have no effect."""
        if self.reference is None and self.paired is None and self.save_stats is None:
            raise ValueError("nothing to compare with: give a --reference, a folder --paired, or a file --save_stats")
        if is_statistics(pictures):
            raise ValueError(f"{pictures!r}: a statistics file can only be the --reference")
        no_features = None if self.needs_features else "without a reference no features are made"
        real = None if self.reference is not None and not is_statistics(self.reference) else "no real pictures are read"
        imagenet = is_imagenet(pictures) or is_imagenet(self.reference)
        reasons = {
            "per_class": None if imagenet else "no source is imagenet",
            "reference_n": real,
            "features": no_features,
            "reader": no_features,
            "inception_weights": no_features,
            "clip": "without --paired nothing is paired" if self.paired is None else None,
        }
        for name, reason in reasons.items():
            if reason is not None and getattr(self, name) is not None:
                raise ValueError(f"{reason}, so --{name} has no effect: leave it out")
