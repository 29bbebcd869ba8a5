"""The seconds that a picture takes, beside those of a baseline's, for the table of results."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dsdiff.benchmark.comparison import all_cores, kept_figures
from dsdiff.benchmark.figures import Spread
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import machine, versions
from dsdiff.pipeline import Pipeline

PROMPT, SEED = "a small red circle", 0


@dataclass(frozen=True, kw_only=True)
class PictureTime:
    """The time of a picture, without reading the model. seconds: the median of all repeats. speed: the baseline's
    seconds divided by these, within each repeat."""

    seconds: float
    speed: Spread


def picture_time(
    own: Pipeline, settings: DrawSettings, base: Pipeline, base_settings: DrawSettings, kept: Path, repeats: int
) -> PictureTime:
    """Draw a picture by `own` and by the baseline in turn, on all cores, once more than `repeats` times each.

    The first one of each is not timed. The figures are written to the file `kept`, and read from there if they were
    measured in the same way on the same kind of machine.
    """
    pairs = ((own, settings), (base, base_settings))

    def measure() -> dict[str, list[float]]:
        times: tuple[list[float], list[float]] = ([], [])
        for pair in pairs:
            _seconds(*pair)
        for i in range(repeats):
            for turn in (0, 1) if i % 2 == 0 else (1, 0):
                times[turn].append(_seconds(*pairs[turn]))
        return {"own": times[0], "base": times[1]}

    with all_cores(own.device):
        facts = {
            "own": {**own.spec.hashes, **asdict(settings)},
            "base": {**base.spec.hashes, **asdict(base_settings)},
            "repeats": repeats,
            "machine": machine(own.device),
            "versions": versions(),
        }
        found = kept_figures(kept, facts, measure)
    ratios = [theirs / ours for theirs, ours in zip(found["base"], found["own"], strict=True)]
    return PictureTime(seconds=statistics.median(found["own"]), speed=Spread.over(ratios))


def _seconds(pipeline: Pipeline, settings: DrawSettings) -> float:
    """Return the seconds from a prompt to a picture in memory."""
    start = time.perf_counter()
    pipeline.decode(pipeline.sample([PROMPT], [SEED], settings), settings)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter() - start
