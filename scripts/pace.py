"""How fast a UNet is beside another one, and how large."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff.checkpoint import unet_bytes
from qdiff.files import write_atomically
from qdiff.quant_model import QuantModel
from scripts.benchmark import inputs_of, seconds_per_call
from scripts.common import SamplingOptions, precision_context
from scripts.drawing import model_of


def unet_figures(flags: Sequence[str], baseline: Sequence[str], kept: Path, repeats: int) -> dict[str, Any]:
    """Size and speed of a UNet, batch 2 as of one picture with guidance, in turn with the baseline's.

    weight_bytes: see below. seconds: a call, median. speed: the baseline's seconds over ours, median, least and most of
    the repeats. What is found is kept in the file `kept` and taken from there. flags, baseline: see `model_of`.
    """
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    model, choice, options = model_of(flags)
    other, _, other_options = (model, choice, options) if list(flags) == list(baseline) else model_of(baseline)
    params = choice.config["model"]["params"]
    inputs = inputs_of(params, model.device)
    inputs["x"] = torch.randn(
        2, choice.channels, options.height // choice.factor, options.width // choice.factor, device=model.device
    )
    own, theirs = [], []
    for i in range(repeats):
        for turn in (0, 1) if i % 2 == 0 else (1, 0):
            if turn == 0:
                own.append(seconds_of(model, options, inputs))
            else:
                theirs.append(seconds_of(other, other_options, inputs))
    ratios = [b / s for b, s in zip(theirs, own, strict=True)]
    figures = {
        "weight_bytes": weight_bytes(flags),
        "seconds": statistics.median(own),
        "speed": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    write_atomically(kept, lambda path: path.write_text(json.dumps(figures), encoding="utf-8"))
    return figures


@torch.no_grad()
def seconds_of(model: nn.Module, options: SamplingOptions, inputs: dict[str, torch.Tensor]) -> float:
    unet = model.model.diffusion_model
    with precision_context(model.device, options.precision):
        return seconds_per_call(lambda: unet(**inputs), model.device)


def weight_bytes(flags: Sequence[str]) -> int:
    """Of the UNet that these flags mean, in float32, or quantized: packed, with its scales, biases and norms."""
    unet = model_of(flags, packed=False)[0].model.diffusion_model
    if isinstance(unet, QuantModel):
        return unet_bytes(unet)
    return sum(4 * parameter.numel() for parameter in unet.parameters())
