"""The seconds that a picture takes, beside those of a baseline's, for the table of results."""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsdiff.benchmark.comparison import all_cores, facts_of, kept_figures
from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.timing import in_turn
from dsdiff.draw_settings import DrawSettings
from dsdiff.pipeline import Pipeline

PROMPT, SEED = "a small red circle", 0


@dataclass(frozen=True, kw_only=True)
class PictureTime:
    """The time of a picture, without reading the model.

    seconds: the median of all repeats. speed: the baseline's seconds divided by these, within each repeat.
    """

    seconds: float
    speed: Spread


def picture_time(
    own: Pipeline, settings: DrawSettings, base: Pipeline, base_settings: DrawSettings, kept: Path, repeats: int
) -> PictureTime:
    """Draw a picture by `own` and by the baseline in turn, on all cores, once more than `repeats` times each.

    The first one of each is not timed. kept: the file of the figures, see `kept_figures`.
    """

    def measure() -> dict[str, list[float]]:
        pairs = ((own, settings), (base, base_settings))
        for pair in pairs:
            _seconds(*pair)
        times = in_turn([partial(_seconds, *pair) for pair in pairs], repeats)
        return dict(zip(("own", "base"), times, strict=True))

    with all_cores(own.device):
        found = kept_figures(kept, facts_of(own, settings, base, base_settings, repeats), measure)
    ratios = [theirs / ours for theirs, ours in zip(found["base"], found["own"], strict=True)]
    return PictureTime(seconds=statistics.median(found["own"]), speed=Spread.over(ratios))


def _seconds(pipeline: Pipeline, settings: DrawSettings) -> float:
    """Return the seconds from a prompt to a picture in memory."""
    start = time.perf_counter()
    pipeline.decode(pipeline.sample([PROMPT], [SEED], settings), settings)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter() - start
