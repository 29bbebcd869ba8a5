"""The time of UNet calls with merged tokens, beside that without merging."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

import tomesd
from dsdiff.benchmark.source import GUIDED, TIMESTEP, Source, inputs_of
from dsdiff.benchmark.variants import build, quant_config, why_not
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import precision_context
from dsdiff.models.registry import CONFIGS
from dsdiff.options import MergeOptions
from dsdiff.pipeline import Pipeline
from qdiff.engine import step_cache

WEIGHT_BIT = 4  # of the engine int8
# (how to merge, calls) -> a block that yields the function which calls a UNet so often.
Running = Callable[[MergeOptions | None, int], AbstractContextManager[Callable[[], Any]]]


def of_pipeline(pipeline: Pipeline, settings: DrawSettings) -> Running:
    """Return what runs the UNet of a pipeline as within a picture, with the batch of one guided picture."""
    spec = pipeline.spec
    size = (settings.height // spec.factor, settings.width // spec.factor)
    inputs = inputs_of(spec.config["model"]["params"], pipeline.device, batch=GUIDED, latents=size)

    @contextmanager
    def running(merge: MergeOptions | None, calls: int) -> Iterator[Callable[[], Any]]:
        model = pipeline.prepare(replace(settings, merge=merge))
        unet = model.model.diffusion_model
        walks = step_cache.walk(unet, [TIMESTEP]), _steps(model, merge, calls)
        with torch.no_grad(), precision_context(pipeline.device, settings.precision), walks[0], walks[1]:
            yield lambda: unet(**inputs)

    return running


def of_sd_v1(engine: str, device: torch.device) -> Running:
    """Return what runs Stable Diffusion v1's UNet with random weights, by an engine of the benchmark.

    Raises ValueError if the engine cannot run here.
    """
    config = quant_config(WEIGHT_BIT)
    reason = why_not(engine, config, device)
    if reason is not None:
        raise ValueError(f"engine {engine} cannot run: {reason}")
    built = build(engine, Source.read(CONFIGS["sd-v1"], True, device), config)

    @contextmanager
    def running(merge: MergeOptions | None, calls: int) -> Iterator[Callable[[], Any]]:
        with built.merging(merge) as call, _steps(built.unet, merge, calls):
            yield call

    return running


def _steps(model: Any, merge: MergeOptions | None, calls: int) -> AbstractContextManager[None]:
    """Return a block whose calls are the steps of a picture, if tokens are merged."""
    return nullcontext() if merge is None else tomesd.walk(model, calls)


def side_by_side(
    running: Running, merge: MergeOptions, device: torch.device, *, calls: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of a call with merging and without, a mean of `calls` for each repeat.

    The calls are spread over the steps of a picture. The order of the two alternates between repeats; before the first
    repeat each makes a call that is not timed.
    """
    ways = (merge, None)
    for way in ways:
        _seconds(running, way, device, 1)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for turn in (0, 1) if i % 2 == 0 else (1, 0):
            times[turn].append(_seconds(running, ways[turn], device, calls))
    return times


def _seconds(running: Running, merge: MergeOptions | None, device: torch.device, calls: int) -> float:
    with running(merge, calls) as call:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls
