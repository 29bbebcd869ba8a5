"""The time of UNet calls drawn in one way, beside those drawn in another."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from dsdiff.benchmark.source import GUIDED, TIMESTEP, Source, inputs_of
from dsdiff.benchmark.timing import in_turn
from dsdiff.benchmark.variants import build, quant_config, why_not
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import precision_context
from dsdiff.models.registry import CONFIGS
from dsdiff.pipeline import Pipeline
from ldm.models.diffusion.guidance import guided_steps
from qdiff.engine import step_cache

WEIGHT_BIT = 4  # of the engine int8
Call = Callable[[int], Any]  # the number of a call -> what the UNet returns
# (how to draw, calls) -> a block that yields the function which makes call i of so many.
Running = Callable[[DrawSettings, int], AbstractContextManager[Call]]


def follows_steps(settings: DrawSettings) -> bool:
    """Return True if some steps compute less than others, so that all have to be timed."""
    return settings.keeps_features or (settings.guidance_start, settings.guidance_stop) != (0, 1)


def of_pipeline(pipeline: Pipeline) -> Running:
    """Return what runs the UNet of a pipeline as within a picture, one at a time."""

    @contextmanager
    def running(settings: DrawSettings, calls: int) -> Iterator[Call]:
        spec = pipeline.spec
        size = (settings.height // spec.factor, settings.width // spec.factor)
        inputs = inputs_of(spec.config["model"]["params"], pipeline.device, batch=GUIDED, latents=size)
        model = pipeline.prepare(settings)
        steps = _steps(model.model.diffusion_model, inputs, settings, calls)
        precision = precision_context(pipeline.device, settings.precision)
        with torch.no_grad(), precision, _merging(model, settings, calls), steps as call:
            yield call

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
    def running(settings: DrawSettings, calls: int) -> Iterator[Call]:
        steps = _steps(built.unet, built.inputs, settings, calls)
        with built.merging(settings.merge), _merging(built.unet, settings, calls), steps as call:
            yield call

    return running


def _merging(model: Any, settings: DrawSettings, calls: int) -> AbstractContextManager[None]:
    """Return a block whose calls are the steps of a picture, if tokens are merged."""
    return nullcontext() if settings.merge is None else tomesd.walk(model, calls)


@contextmanager
def _steps(unet: nn.Module, inputs: Mapping[str, Tensor], settings: DrawSettings, calls: int) -> Iterator[Call]:
    """Yield the function that calls the UNet as in step i of a picture of so many steps, or of steps that are alike.

    inputs: of a guided call of one picture; the others take the first half of them.
    """
    guided = [False] * calls
    if settings.guides:
        guided = guided_steps(calls, (settings.guidance_start, settings.guidance_stop))
    times = [TIMESTEP * (1 - i / calls) for i in range(calls)]

    def call(i: int) -> Any:
        batch = GUIDED if guided[i] else 1
        own = {name: value[:batch] for name, value in inputs.items()}
        own["timesteps"] = torch.full_like(own["timesteps"], times[i], dtype=torch.float32)
        return unet(**own)

    with step_cache.walk(unet, times), settings.keeping(unet):
        yield call


def side_by_side(
    running: Running, own: DrawSettings, base: DrawSettings, device: torch.device, *, calls: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of a call in a way of its own and in that of the base, a mean of `calls` for each repeat.

    The calls are spread over the steps of a picture. The order of the two alternates between repeats; before the first
    repeat each makes calls that are not timed.
    """
    ways = (own, base)
    for way in ways:
        _seconds(running, way, device, calls, timed=min(calls, 2))
    seconds, others = in_turn([partial(_seconds, running, way, device, calls, timed=calls) for way in ways], repeats)
    return seconds, others


def _seconds(running: Running, way: DrawSettings, device: torch.device, calls: int, timed: int) -> float:
    """Return the seconds of a call, the mean of the first `timed` of so many calls."""
    with running(way, calls) as call:
        start = time.perf_counter()
        for i in range(timed):
            call(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / timed
