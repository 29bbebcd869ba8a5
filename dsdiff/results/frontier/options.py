"""The options of a comparison of ways to draw, and the file that lists the ways. Imports no torch."""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dsdiff.checks import check_choice, check_whole
from dsdiff.models.registry import ROOT
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions, QuantizationOptions

MERGING, STEPS = ROOT / "configs/eval/merging.yaml", ROOT / "configs/eval/steps.yaml"
PARTS = ("eps", "pictures", "attributes", "time")
TIME_OF = ("model", "sd-v1")
ENGINES = ("float32", "bf16", "int8")  # of sd-v1
DRAWING = ("guidance_start", "guidance_stop", "cache", "cache_depth")  # fields of DrawOptions that a way may have
CALLS = 12  # of a measurement of time, where steps are alike


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to draw, and its name.

    merge: how it merges tokens; None as the others. drawing: its own fields of DrawOptions, some of DRAWING. whole: the
    share of the steps that compute all of the UNet, by a schedule that is found for it; None for no schedule.
    Raises ValueError for values that DrawOptions refuses.
    """

    name: str
    merge: MergeOptions | None = None
    drawing: Mapping[str, Any] = field(default_factory=dict)
    whole: float | None = None

    def __post_init__(self) -> None:
        if self.whole is None:
            self.options(DrawOptions())
            return
        if not 0 < self.whole <= 1:
            raise ValueError(f"{self.name!r}: whole is {self.whole!r}: it must be a share of the steps, in (0, 1]")
        if "cache" in self.drawing:
            raise ValueError(f"{self.name!r} has cache and whole: leave out one of them")

    @property
    def changes(self) -> dict[str, Any]:
        """The changes to the base, as plain values."""
        merge = {} if self.merge is None else {"merge": asdict(self.merge)}
        return {**merge, **self.drawing, **({} if self.whole is None else {"whole": self.whole})}

    def options(self, base: DrawOptions, schedule: Path | None = None) -> DrawOptions:
        """Return how it draws. schedule: the file of cached steps that was found for it."""
        merge = {} if self.merge is None else {"merge": self.merge}
        if schedule is None:
            return replace(base, **merge, **self.drawing)
        return replace(base, **merge, **{**self.drawing, "cache": schedule, "cache_depth": 1})


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """How ways to draw are compared with a base, which draws as `draw` says.

    settings: the file that lists them. names: those of its names to measure; empty for all. parts: what is measured,
    some of PARTS. model, draw, quantization: the model, and how the base is drawn. prompts: a file with a prompt a
    line; None takes captions of shapes. n: prompts, each drawn once. seed: of captions and noise. time_of: whose calls
    are timed, the "model" or Stable Diffusion v1's UNet with random weights, "sd-v1". engine: what computes the latter.
    calls: of the UNet in a measurement of time, spread over the steps. None takes CALLS, and all steps of a picture
    where they are not alike. repeats: of the measurements. outdir: for all files. batch_size: pictures drawn at a time.
    device: auto, cpu, cuda or cuda:N. quality: a JSON file of another run, whose figures are taken of all but time.
    Raises ValueError for a value out of range.
    """

    settings: Path = MERGING
    names: Sequence[str] = ()
    parts: Sequence[str] = PARTS
    model: ModelOptions = field(default_factory=ModelOptions)
    draw: DrawOptions = field(default_factory=DrawOptions)
    quantization: QuantizationOptions | None = None
    tokenizer: Path | None = None
    prompts: Path | None = None
    n: int = 64
    seed: int = 0
    time_of: str = TIME_OF[0]
    engine: str = ENGINES[0]
    calls: int | None = None
    repeats: int = 5
    outdir: Path = Path("outputs/frontier")
    batch_size: int = 16
    device: str = "auto"
    quality: Path | None = None

    def __post_init__(self) -> None:
        for name, low in (("n", 2), ("seed", 0), ("calls", 1), ("repeats", 1), ("batch_size", 1)):
            check_whole(name, getattr(self, name), low, optional=name == "calls")
        for name, choices in (("time_of", TIME_OF), ("engine", ENGINES)):
            check_choice(name, getattr(self, name), choices)
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts is {list(self.parts)!r}: it must name some of {', '.join(PARTS)}")
        if self.quality is not None and set(self.parts) != {"time"}:
            raise ValueError("--quality takes all figures but time from a file: give --parts time")


def read_candidates(path: Path, names: Sequence[str] = ()) -> list[Candidate]:
    """Read the ways to draw in a yaml file, see configs/eval. names: those wanted; empty for all.

    Raises FileNotFoundError, or ValueError for a file or a name that cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = [_candidate(entry) for entry in content["settings"]]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"settings {str(path)!r}: they must be a list of entries with a name: {error}") from error
    except ValueError as error:
        raise ValueError(f"settings {str(path)!r}: {error}") from error
    known = [candidate.name for candidate in found]
    if len(set(known)) != len(known) or not known:
        raise ValueError(f"settings {str(path)!r}: each entry needs a name of its own")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"settings {str(path)!r} have no {unknown[0]!r}: they have {', '.join(map(repr, known))}")
    return [candidate for candidate in found if candidate.name in (names or known)]


def _candidate(entry: dict[str, Any]) -> Candidate:
    given = dict(entry)
    name, whole = str(given.pop("name")), given.pop("whole", None)
    drawing = {key: given.pop(key) for key in DRAWING if key in given}
    unknown = given.keys() - {each.name for each in fields(MergeOptions)}
    if unknown:
        raise ValueError(f"{name!r} has {', '.join(sorted(unknown))}, which is no option of merging, guidance or cache")
    return Candidate(name=name, merge=MergeOptions(**given) if given else None, drawing=drawing, whole=whole)
