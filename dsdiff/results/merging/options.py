"""The options of a comparison of ways to merge tokens, and the file that lists the ways. Imports no torch."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dsdiff.models.registry import ROOT
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions, QuantizationOptions

SETTINGS = ROOT / "configs/eval/merging.yaml"
PARTS = ("eps", "pictures", "time")
TIME_OF = ("model", "sd-v1")
ENGINES = ("float32", "bf16", "int8")  # of sd-v1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to merge tokens, and its name."""

    name: str
    merge: MergeOptions


@dataclass(frozen=True, kw_only=True)
class MergingCostOptions:
    """How ways to merge tokens are compared.

    settings: the file that lists them. names: those of its names to measure; empty for all. parts: what is measured,
    some of PARTS. model, draw, quantization: the model, and how its pictures are drawn, without merging. prompts: a
    file with a prompt a line; None takes captions of shapes. n: prompts, each drawn once. seed: of captions and noise.
    time_of: whose calls are timed, the "model" or Stable Diffusion v1's UNet with random weights, "sd-v1". engine: what
    computes the latter. calls: of the UNet in a measurement of time, spread over the steps. repeats: of the
    measurements. outdir: for all files. batch_size: pictures drawn at a time. device: auto, cpu, cuda or cuda:N.
    Raises ValueError for a value out of range.
    """

    settings: Path = SETTINGS
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
    calls: int = 12
    repeats: int = 5
    outdir: Path = Path("outputs/merging")
    batch_size: int = 16
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("n", 2), ("seed", 0), ("calls", 1), ("repeats", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of {low} or more")
        for name, choices in (("time_of", TIME_OF), ("engine", ENGINES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts is {list(self.parts)!r}: it must name some of {', '.join(PARTS)}")
        if self.draw.merge is not None:
            raise ValueError("pictures are compared with those without merging: leave draw.merge out")


def read_candidates(path: Path, names: Sequence[str] = ()) -> list[Candidate]:
    """Read the ways to merge in a yaml file, see configs/eval/merging.yaml. names: those wanted; empty for all.

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
    name = str(given.pop("name"))
    unknown = given.keys() - {each.name for each in fields(MergeOptions)}
    if unknown:
        raise ValueError(f"{name!r} has {', '.join(sorted(unknown))}, which MergeOptions does not know")
    return Candidate(name=name, merge=MergeOptions(**given))
