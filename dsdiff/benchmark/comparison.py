"""Time a model's UNet against a baseline's, and measure its size in bytes, for the table of results."""

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.report import write_text
from dsdiff.benchmark.source import TIMESTEP, inputs_of
from dsdiff.benchmark.timing import in_turn, seconds_per_call
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import machine, precision_context, usable_cores, versions
from dsdiff.options import CALIBRATION_ENGINE, QuantizationOptions
from dsdiff.pipeline import Pipeline
from qdiff.checkpoint import quantized_bytes
from qdiff.engine import step_cache
from qdiff.quant_model import QuantModel

logger = logging.getLogger(__name__)

SECONDS = 0.5  # a measurement is the mean of the calls that fit into this time


@dataclass(frozen=True, kw_only=True)
class UNetFigures:
    """The size and speed of a UNet.

    weight_bytes: see the function `weight_bytes`. seconds: time of a call, the median of all repeats. speed: the
    baseline's seconds divided by these, within each repeat.
    """

    weight_bytes: int
    seconds: float
    speed: Spread


def unet_figures(
    own: Pipeline, own_settings: DrawSettings, base: Pipeline, base_settings: DrawSettings, kept: Path, repeats: int
) -> UNetFigures:
    """Time the UNet of `own` and that of the baseline in turn, on all cores.

    The batch is 2, as for one picture with guidance. kept: the file of the figures, see `kept_figures`.
    """

    def measure() -> dict[str, Any]:
        size = weight_bytes(as_calibrated(own))  # before the others are read: three models may not fit into memory
        seconds, others = side_by_side(own, own_settings, base, base_settings, repeats)
        speed = Spread.over([theirs / ours for theirs, ours in zip(others, seconds, strict=True)])
        return asdict(UNetFigures(weight_bytes=size, seconds=statistics.median(seconds), speed=speed))

    with all_cores(own.device):
        facts = facts_of(own, own_settings, base, base_settings, repeats)
        found = kept_figures(kept, facts, measure)
    return UNetFigures(**{**found, "speed": Spread(**found["speed"])})


def weight_bytes(pipeline: Pipeline) -> int:
    """Return the bytes of a UNet's parameters: all in float32, or for a quantized UNet as its cali_ckpt stores them.

    A quantized pipeline must have been made with the engine "calibration". Raises ValueError for a lowered one.
    """
    unet = pipeline.model.model.diffusion_model
    if pipeline.quantization is None:
        return sum(4 * parameter.numel() for parameter in unet.parameters())
    if pipeline.quantization.engine is not None or not isinstance(unet, QuantModel):
        raise ValueError('the bytes of weights are told of a pipeline with the engine "calibration"')
    return quantized_bytes(unet)


def as_calibrated(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline of the same model with the engine "calibration"; a float pipeline is returned as it is."""
    quantization = pipeline.quantization
    if quantization is None or quantization.engine is None:
        return pipeline
    options = QuantizationOptions(
        cali_ckpt=None if pipeline.spec.bundle else Path(quantization.cali_ckpt),
        weight_bit=quantization.config.weight_bit,
        quant_act=quantization.quant_act,
        engine=CALIBRATION_ENGINE,
    )
    return Pipeline(
        pipeline.spec,
        device=pipeline.device,
        tokenizer=pipeline.tokenizer,
        quantization=options,
        lora=pipeline.merged_lora,
    )


@contextmanager
def all_cores(device: torch.device) -> Iterator[None]:
    """Let torch use all cores of a CPU within the block; torchrun gives each process one."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    own: Pipeline, own_settings: DrawSettings, base: Pipeline, base_settings: DrawSettings, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds per call of both UNets, one value per repeat; their order alternates between repeats."""
    inputs = inputs_of(own.spec.config["model"]["params"], own.device)
    shape = (2, own.spec.channels, own_settings.height // own.spec.factor, own_settings.width // own.spec.factor)
    inputs["x"] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(own.device)
    pairs = ((own, own_settings), (base, base_settings))
    seconds, others = in_turn([partial(_seconds, *pair, inputs) for pair in pairs], repeats)
    return seconds, others


@torch.no_grad()
def _seconds(pipeline: Pipeline, settings: DrawSettings, inputs: Mapping[str, Tensor]) -> float:
    """Time a call of a pipeline's UNet, as within a picture of these settings."""
    unet = pipeline.prepare(settings).model.diffusion_model
    walk = step_cache.walk(unet, [TIMESTEP])
    with precision_context(pipeline.device, settings.precision), walk, pipeline.recorded() as called:
        return seconds_per_call(lambda: called(**inputs), pipeline.device, seconds=SECONDS)


# --- the file ----------------------------------------------------------------------------------------------


def facts_of(
    own: Pipeline, own_settings: DrawSettings, base: Pipeline, base_settings: DrawSettings, repeats: int
) -> dict[str, Any]:
    """Return all that the figures of a comparison depend on."""
    return {
        "own": {**own.spec.hashes, **asdict(own_settings)},
        "base": {**base.spec.hashes, **asdict(base_settings)},
        "repeats": repeats,
        "machine": machine(own.device),
        "versions": versions(),
    }


def kept_figures(kept: Path, facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures in a file if it has these facts; else measure them, and write the file."""
    plain = json.loads(json.dumps(facts, default=str))  # as they are read back from JSON, so that the two compare
    if kept.is_file():
        try:
            content = json.loads(kept.read_text(encoding="utf-8"))
            if content["facts"] == plain:
                return content["figures"]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("the figures in %s cannot be read (%s): measuring anew", kept, error)
    figures = measure()
    write_text(kept, json.dumps({"facts": plain, "figures": figures}, indent=2))
    return figures
