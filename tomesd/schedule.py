"""Texts that say where how many tokens are merged: by step, and by level. Importing this imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

DOWNSAMPLES = (1, 2, 4, 8)
LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The ratio of each step of a picture. Places are shares of the steps: 0 is the first step, 0.5 half of them.

    points: (place, ratio), by ascending places in [0, 1). is_linear: ratios go in a straight line from the first of
    two points to the second, which is that of the last step; otherwise each ratio holds until the next place.
    """

    points: tuple[tuple[float, float], ...]
    is_linear: bool = False

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read "PLACE:RATIO,PLACE:RATIO,..." or "linear:FIRST:LAST". Raises ValueError for anything else."""
        try:
            if text.startswith(f"{LINEAR}:"):
                first, last = (float(part) for part in text.split(":")[1:])
                points, is_linear = ((0.0, first), (1.0, last)), True
            else:
                points, is_linear = tuple(_pairs(text)), False
        except (ValueError, AttributeError, TypeError):
            raise _bad(text) from None
        places = [place for place, _ in points]
        ordered = all(before < after for before, after in pairwise(places))
        if not (ordered and (is_linear or all(0 <= place < 1 for place in places))):
            raise _bad(text)
        return cls(points=points, is_linear=is_linear)

    @property
    def starts_at_once(self) -> bool:
        """True if it gives the ratio of every step."""
        return self.points[0][0] == 0

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(ratio for _, ratio in self.points)

    def at(self, step: int, steps: int) -> float | None:
        """Return the ratio of step 0, 1, ... of `steps`; None for steps before the first place."""
        if self.is_linear:
            first, last = self.ratios
            return first + (last - first) * step / max(1, steps - 1)
        found = None
        for place, ratio in self.points:
            if step >= place * steps - 1e-9:  # 0.55 * 20 is above 11 in floats
                found = ratio
        return found


def parse_limits(text: str) -> dict[int, float]:
    """Read "LEVEL:RATIO,LEVEL:RATIO,...": level N sees the latents at 1/N of their size. Raises ValueError."""
    try:
        pairs = list(_pairs(text))
        limits = {int(level): ratio for level, ratio in pairs}
        if len(limits) == len(pairs) and all(level in DOWNSAMPLES for level, _ in pairs):
            return limits
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(
        f"merge_levels is {text!r}: write LEVEL:RATIO,... with levels of {', '.join(map(str, DOWNSAMPLES))}, such as "
        "1:0.6,2:0.3"
    )


def _pairs(text: str) -> Iterator[tuple[float, float]]:
    """Yield the two numbers of each "A:B" in a list with commas. Raises ValueError if there are others than two."""
    for part in text.split(","):
        first, second = (float(number) for number in part.split(":"))
        yield first, second


def _bad(text: object) -> ValueError:
    return ValueError(
        f"merge_schedule is {text!r}: write PLACE:RATIO,... with ascending places in [0, 1), such as 0:0.7,0.5:0.3, "
        "or linear:FIRST:LAST"
    )
