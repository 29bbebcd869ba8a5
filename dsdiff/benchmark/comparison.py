"""How fast a UNet is beside another one, and how large."""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.benchmark.source import inputs_of
from dsdiff.benchmark.timing import machine, seconds_per_call
from dsdiff.jobs import model_of, options_of
from dsdiff.pipeline import SamplingOptions, choose_device, precision_context, versions
from ldm.fileio import write_atomically
from qdiff.checkpoint import unet_bytes
from qdiff.quant_model import QuantModel


def unet_figures(flags: Sequence[str], baseline: Sequence[str], kept: Path, repeats: int) -> dict[str, Any]:
    """Size and speed of a UNet, batch 2 as of one picture with guidance, in turn with the baseline's, on all cores.

    weight_bytes: see below. seconds: a call, median. speed: the baseline's seconds over ours, median, least and most of
    the repeats. They are kept in the file `kept`, and taken from there if they were measured in the same way on the
    same kind of machine. flags, baseline: see `model_of`.
    """
    args, _, options = options_of(flags)
    device = choose_device(args.device)
    with all_cores(device):
        facts = {"options": asdict(options), "repeats": repeats, "machine": machine(device), "versions": versions()}
        facts = json.loads(json.dumps(facts, default=str))
        if kept.exists() and (old := json.loads(kept.read_text(encoding="utf-8")))["facts"] == facts:
            return old["figures"]
        size = weight_bytes(flags)  # before the others: three models at once may be one too many
        own, theirs = side_by_side(flags, baseline, repeats)
    ratios = [b / s for b, s in zip(theirs, own, strict=True)]
    speed = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    figures = {"weight_bytes": size, "seconds": statistics.median(own), "speed": speed}
    content = json.dumps({"facts": facts, "figures": figures}, indent=2)
    write_atomically(kept, lambda path: path.write_text(content, encoding="utf-8"))
    return figures


@contextmanager
def all_cores(device: torch.device) -> Iterator[None]:
    """Within the block torch uses all cores of a CPU: torchrun gives each process one."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(flags: Sequence[str], baseline: Sequence[str], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds a call of both UNets, by turns, every second time the other way round."""
    model, choice, options = model_of(flags)
    other, _, other_options = (model, choice, options) if list(flags) == list(baseline) else model_of(baseline)
    height, width = options.height // choice.factor, options.width // choice.factor
    inputs = inputs_of(choice.config["model"]["params"], model.device)
    inputs["x"] = torch.randn(2, choice.channels, height, width, generator=torch.Generator().manual_seed(0))
    inputs["x"] = inputs["x"].to(model.device)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for turn in (0, 1) if i % 2 == 0 else (1, 0):
            times[turn].append(seconds_of(*((model, options), (other, other_options))[turn], inputs))
    return times


@torch.no_grad()
def seconds_of(model: nn.Module, options: SamplingOptions, inputs: dict[str, Tensor]) -> float:
    unet = model.model.diffusion_model
    with precision_context(model.device, options.precision):
        return seconds_per_call(lambda: unet(**inputs), model.device)


def weight_bytes(flags: Sequence[str]) -> int:
    """Of the UNet that these flags mean, in float32, or quantized: packed, with its scales, biases and norms."""
    unet = model_of(flags, packed=False)[0].model.diffusion_model
    if isinstance(unet, QuantModel):
        return unet_bytes(unet)
    return sum(4 * parameter.numel() for parameter in unet.parameters())
