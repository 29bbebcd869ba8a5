"""Choose the steps in which all of a UNet is computed, by the error that features of an earlier step make.

A few pictures are drawn without cached features. For all steps i < j the error of eps in step j is measured, on the
deep features of step i. An error weighs as much as the noise that its step removes: an early one shapes the whole
picture. The errors of a schedule are taken to add up over its steps. Then dynamic programming finds the schedule with
the least sum for each number of whole steps, and there is none with less.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsdiff.cache_schedule import CacheSchedule
from dsdiff.draw_settings import SAMPLERS, DrawSettings
from dsdiff.environment import versions
from dsdiff.jobs import check_text, read_prompt_file
from dsdiff.metrics.eps_errors import EpsErrors
from dsdiff.models.spec import ModelSpec
from dsdiff.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Search:
    """How schedules are looked for.

    prompts: of the pictures that are drawn. seed: picture i starts from the noise of seed + i. batch_size: pictures at
    a time. depth: see DrawSettings. longest: for how many steps features may be kept, at most.
    Raises ValueError if features may be kept for less than 2 steps.
    """

    prompts: Sequence[str]
    seed: int
    batch_size: int
    depth: int
    longest: int

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise ValueError(f"longest is {self.longest}: features must be kept for 2 steps or more to gain anything")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best schedule of so many whole steps: their numbers, and the weighted mean error of eps over all steps."""

    whole: tuple[int, ...]
    error: float


# --- measuring ---------------------------------------------------------------------------------------------


def measure(pipeline: Pipeline, settings: DrawSettings, search: Search) -> np.ndarray:
    """Return the error of eps in step j on deep features of step i as table[i, j], the mean over prompts.

    settings: without cached features. Where i >= j it is 0; where features are kept for too long, or are of another
    batch, it is infinite.

    A walk whose whole steps are `longest` apart measures an error in each step, so as many walks measure all.
    """
    errors = EpsErrors(pipeline, settings, search.prompts, search.seed, search.batch_size)
    step_of = [step for step, (_, calls) in enumerate(groupby(_times(pipeline, settings))) for _ in calls]
    n = step_of[-1] + 1
    batches = [len(output) for output in errors.exact[0].outputs]
    batch_of = [batches[step_of.index(step)] for step in range(n)]
    table = np.where(np.arange(n)[:, None] < np.arange(n), np.inf, 0.0)
    for first in tqdm(range(min(search.longest, n)), "schedules", unit="walk"):
        whole = sorted({0, *range(first, n, search.longest)})
        cached = replace(settings, cache=tuple(whole), cache_depth=search.depth)
        means = errors.of(cached, f"whole from step {first} on").mean(0).numpy()
        by_step = [means[[call for call, own in enumerate(step_of) if own == step]].mean() for step in range(n)]
        for start, stop in zip(whole, [*whole[1:], n], strict=True):
            for step in range(start + 1, min(stop, start + search.longest)):
                if len(set(batch_of[start : step + 1])) == 1:
                    table[start, step] = by_step[step]
    return table


def weights(pipeline: Pipeline, settings: DrawSettings) -> np.ndarray:
    """Return the weight of an error in each step, mean 1: how much of the noise level sigma the step removes."""
    times = [time for time, _ in groupby(_times(pipeline, settings))]
    alpha_bar = pipeline.model.alphas_cumprod.double().cpu().numpy()
    sigma = np.interp(times, np.arange(len(alpha_bar)), ((1 - alpha_bar) / alpha_bar) ** 0.5)
    removed = sigma - np.append(sigma[1:], 0)
    return removed / removed.mean()


def _times(pipeline: Pipeline, settings: DrawSettings) -> list[int | float]:
    """Return the times of all calls of the UNet. PLMS calls it twice in its second step."""
    return SAMPLERS[settings.sampler](pipeline.model).schedule(settings.steps, settings.eta)


# --- choosing ----------------------------------------------------------------------------------------------


def choose(table: np.ndarray) -> list[Choice]:
    """Return the best schedule for each number of whole steps that can be had, the fewest first.

    table: of `measure`, [n, n], weighted. least[k][j] is the least sum of errors of the steps before j, where j is a
    whole step and k whole steps come before it; j = n is the end. It is the minimum over i < j of least[k - 1][i] plus
    the errors of the steps between i and j on the features of i.
    """
    n = len(table)
    sums = np.concatenate([np.zeros((n, 1)), np.cumsum(table, axis=1)], axis=1)  # of the steps before j, [n, n + 1]
    cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        cost[i, i + 1 :] = sums[i, i + 1 :]  # steps up to i cost nothing
    least = np.full((n + 1, n + 1), np.inf)
    before = np.zeros((n + 1, n + 1), dtype=int)
    least[0, 0] = 0
    for k in range(1, n + 1):
        through = least[k - 1, :n, None] + cost  # [i, j]
        before[k], least[k] = through.argmin(axis=0), through.min(axis=0)
    choices = []
    for k in range(1, n + 1):
        if not np.isfinite(least[k, n]):
            continue
        whole = [n]
        for left in range(k, 0, -1):
            whole.append(int(before[left, whole[-1]]))
        choices.append(Choice(whole=tuple(reversed(whole[1:])), error=float(least[k, n] / n)))
    return choices


def pick(choices: Sequence[CacheSchedule], *, error: float | None = None, whole: int | None = None) -> CacheSchedule:
    """Return the schedule of the fewest whole steps with at most this error, or the one of so many whole steps.

    Give one of the two. choices: by their number of whole steps, that of all steps the last. Raises ValueError if none
    has so many.
    """
    if whole is None:
        return next(each for each in choices if error is None or each.error <= error)
    found = [each for each in choices if len(each.whole) == whole]
    if not found:
        least, most = len(choices[0].whole), len(choices[-1].whole)
        raise ValueError(f"no schedule has {whole} whole steps: {least} to {most} can be had")
    return found[0]


# --- the whole ---------------------------------------------------------------------------------------------


def schedules(pipeline: Pipeline, settings: DrawSettings, search: Search) -> list[CacheSchedule]:
    """Return the best schedule for each number of whole steps, see `measure` and `choose`.

    Raises ValueError for settings that keep features already, and for a depth that the UNet does not have.
    """
    if settings.keeps_features:
        raise ValueError("a schedule is found on pictures without cached features: leave --cache out")
    deepest = pipeline.spec.output_blocks - 1
    if not 1 <= search.depth <= deepest:
        raise ValueError(f"cache_depth is {search.depth}: this model's UNet takes 1 to {deepest}")
    choices = choose(measure(pipeline, settings, search) * weights(pipeline, settings))
    made = {
        "ckpt": pipeline.spec.ckpt.name,
        **pipeline.spec.hashes,
        "bits": None if settings.quantization is None else settings.quantization.bits,
        "prompts": len(search.prompts),
        "seed": search.seed,
        "longest": search.longest,
        "scale": settings.scale,
        "merge": None if settings.merge is None else asdict(settings.merge),
        "versions": versions(),
    }
    return [
        CacheSchedule(
            sampler=settings.sampler,
            steps=settings.steps_taken,
            guidance=(settings.guidance_start, settings.guidance_stop) if settings.guides else None,
            depth=search.depth,
            whole=choice.whole,
            error=choice.error,
            made=made,
        )
        for choice in choices
    ]


def prompts_of(spec: ModelSpec, file: Path | None, n: int) -> list[str]:
    """Return n prompts, those of a file in turn. None takes the model's calibration prompts.

    Raises ValueError if the model has none.
    """
    path = file or spec.cali_prompts
    if path is None:
        raise ValueError(f"no prompts are known for {spec.description}: give --prompts FILE")
    read = read_prompt_file(path, "--prompts")
    check_text(read)
    return [read[i % len(read)] for i in range(n)]


def markdown(choices: Sequence[CacheSchedule], chosen: CacheSchedule) -> str:
    """Return a table of the schedules; the chosen one is bold."""
    lines = ["| whole steps | error of eps | which |", "|---|---|---|"]
    for each in choices:
        mark = "**" if each is chosen else ""
        steps = " ".join(map(str, each.whole))
        lines.append(f"| {mark}{len(each.whole)} of {each.steps}{mark} | {each.error:.2e} | {steps} |")
    return "\n".join(lines)


def write(schedule: CacheSchedule, path: Path) -> None:
    """Write a schedule, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schedule.write(path)
