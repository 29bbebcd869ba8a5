"""Schedules of cached steps: the file that says in which steps all of a UNet is computed. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dsdiff.checks import check_whole, is_whole
from ldm.fileio import json_object, write_atomically
from ldm.messages import brief

FORMAT = "dsdiff cache schedule 1"
Guidance = tuple[float, float] | None  # the shares of the steps between which there is guidance; None for none


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """The steps of one sampler in which all of the UNet is computed; the other steps compute its ends alone.

    sampler, steps, guidance: what it was made for, see DrawSettings; `steps` are those taken. depth: how many input and
    output blocks are computed in the other steps. whole: the numbers of the whole steps, ascending from 0. error: the
    mean squared error of guided eps that was measured for it, over all steps. made: how, for the reader of the file.
    Raises ValueError for a value that cannot be.
    """

    sampler: str
    steps: int
    guidance: Guidance
    depth: int
    whole: tuple[int, ...]
    error: float
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "depth"):
            check_whole(name, getattr(self, name), 1)
        numbers = list(self.whole)
        ascending = all(map(is_whole, numbers)) and numbers == sorted(set(numbers))
        if not numbers or not ascending or numbers[0] != 0 or numbers[-1] >= self.steps:
            raise ValueError(f"whole is {numbers}: it must be numbers of steps, 0..{self.steps - 1} in order, from 0")

    def check(self, name: str, *, sampler: str, steps: int, guidance: Guidance) -> None:
        """Raise ValueError if the schedule, read from the file `name`, was made for other steps than these."""
        for what, own, given in (
            ("sampler", self.sampler, sampler),
            ("steps", self.steps, steps),
            ("guidance", _words(self.guidance), _words(guidance)),
        ):
            if own != given:
                raise ValueError(
                    f"cache {name!r} was made for {what} {own}, and this is {given}: draw like that, or make another "
                    "with scripts/schedule_cache.py"
                )

    # --- the file -----------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write the schedule as JSON."""
        guidance = None if self.guidance is None else list(self.guidance)
        content = {"format": FORMAT, "sampler": self.sampler, "steps": self.steps, "guidance": guidance}
        content |= {"depth": self.depth, "whole": list(self.whole), "error": self.error, "made": dict(self.made)}
        lines = [f'  "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in content.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write`. Raises OSError if there is none, and ValueError if it is another one."""
        try:
            content = json_object(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            return cls(
                sampler=content["sampler"],
                steps=content["steps"],
                guidance=_interval(content["guidance"]),
                depth=content["depth"],
                whole=tuple(content["whole"]),
                error=float(content["error"]),
                made=content["made"],
            )
        except (KeyError, TypeError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else brief(error)
            raise ValueError(f"cache {str(path)!r} is no file of scripts/schedule_cache.py: {why}") from error


def _interval(shares: Sequence[float] | None) -> Guidance:
    if shares is None:
        return None
    start, stop = map(float, shares)
    return start, stop


def _words(guidance: Guidance) -> str:
    if guidance is None:
        return "none"
    return "in all steps" if guidance == (0, 1) else f"from {guidance[0]:g} to {guidance[1]:g}"
