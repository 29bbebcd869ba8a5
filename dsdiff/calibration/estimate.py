"""Estimate what a calibration will take in time, memory and disk, and refuse one that does not fit."""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dsdiff.calibration.options import GIB
from qdiff.calibrate import calibration_steps
from qdiff.calibration_set import CalibrationSet
from qdiff.config import MixConfig, ReconConfig
from qdiff.distributed import world_size
from qdiff.gptq import EXACT
from qdiff.quant_block import MAX_SCORES
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

logger = logging.getLogger(__name__)

PRODUCT = 2048  # side of the matrices whose product is timed
CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The needs of a calibration, of all processes on this machine together.

    activations: bytes of the largest unit's inputs and outputs, in memory or on disk. memory: bytes of main memory
    beyond the loaded model. gpu_memory: the same for the GPU of each process, 0 without one.
    """

    seconds: float
    activations: int
    memory: int
    gpu_memory: int = 0

    def on_disk(self, cache: int) -> int:
        """Return the bytes of activations that do not fit into a cache of that many bytes."""
        return max(self.activations - cache, 0)


# --- what is needed ----------------------------------------------------------------------------------------


def estimate(
    qnn: QuantModel,
    data: CalibrationSet,
    recon: ReconConfig | None,
    batch_size: int,
    cache: int,
    mix: MixConfig | None = None,
) -> Estimate:
    """Return the needs of a calibration, estimated from one timed forward pass of one batch.

    batch_size: samples per forward pass. cache: bytes of activations that are kept in memory. mix: which inputs get
    more bits, None for none.
    """
    device = next(qnn.parameters()).device
    measured = _measure(qnn, data, batch_size)
    sizes = measured.unit_bytes
    gptq = recon is not None and recon.rounding == "gptq"
    steps = calibration_steps(qnn, recon)
    learned = [step for step in steps if step.phase == "activations" or (step.phase == "weights" and not gptq)]
    # Ranges take a pass. A unit that learns is reached twice, on average half way through the UNet. Its own passes,
    # over all units, make whole ones: two evaluations in each of two phases, and iterations of forward and backward,
    # which take three times a forward.
    passes = len(data) * ((len(learned) + 4 if learned else 0) + qnn.config.quant_act)
    if recon is not None:
        iterations = 0 if gptq or recon.rounding == "nearest" else recon.iters_w
        passes += 3 * recon.batch_size * (iterations + (recon.iters_a if qnn.config.quant_act else 0))
    activations = max(sizes) * len(data) if learned else 0
    # Codes beside the weights; of the unit at work alpha, its gradient, Adam's two moments, and what the graph keeps of
    # them; of its samples what the graph keeps, and some attention matrices.
    weights = sum(4 * parameter.numel() for parameter in qnn.parameters())
    largest = max(sum(4 * p.numel() for p in unit.parameters()) for unit in qnn.units().values())
    working = 12 * largest + 24 * max(sizes) * batch_size + 16 * MAX_SCORES if learned else 0
    seconds = measured.seconds * passes / world_size()
    if mix is not None:  # a pass to fit ranges, and for each probe one forward and backward; processes share none
        seconds += measured.seconds * min(mix.samples, len(data)) * (1 + 3 * mix.probes)
    if gptq and recon is not None:
        samples = min(recon.samples_w, len(data)) / world_size() * (1 if recon.sym else 2)
        seconds += measured.seconds * samples + _gptq_seconds(qnn, measured, samples / (1 if recon.sym else 2))
        working = max(working, measured.gptq_bytes(samples))
    at_work = int(weights * 0.15 + working)
    on_gpu = at_work if device.type == "cuda" else 0
    return Estimate(
        seconds=seconds,
        activations=activations * local_processes(),
        memory=(min(activations, cache) + at_work - on_gpu) * local_processes(),
        gpu_memory=on_gpu,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A forward pass of one sample.

    seconds: its time. unit_bytes, layer_bytes: of the input and output of each unit, and of each quantized layer.
    skip_bytes: of the outputs that the encoder keeps for the decoder. places: outputs of each layer, per channel.
    columns: of each layer's weight.
    """

    seconds: float
    unit_bytes: list[int]
    layer_bytes: list[int]
    skip_bytes: int
    places: list[int]
    columns: list[int]

    def gptq_bytes(self, samples: float) -> int:
        """Return what GPTQ needs at most for so many samples at once: activations, sums over them, and factors."""
        needs = []
        for n, size in zip(self.columns, self.layer_bytes, strict=True):
            needs.append(samples * (self.skip_bytes + 2 * size) + (12 if n > EXACT else 20) * n**2)
        return int(max(needs))


def _gptq_seconds(qnn: QuantModel, measured: Measured, samples: float) -> float:
    """Return the time that GPTQ's sums and factors take, by the speed of a matrix product."""
    factor = torch.randn(PRODUCT, PRODUCT, device=next(qnn.parameters()).device)
    times = []
    for _ in range(3):  # the first call is slower
        began = time.perf_counter()
        torch.mm(factor, factor)
        _synchronize(factor.device)
        times.append(time.perf_counter() - began)
    layers = zip(measured.columns, measured.places, qnn.layers().values(), strict=True)
    products = sum(samples * places * n**2 + n**3 / 3 + len(layer.weight) * n**2 for n, places, layer in layers)
    return products * min(times) / PRODUCT**3


@torch.no_grad()
def _measure(qnn: QuantModel, data: CalibrationSet, batch_size: int) -> Measured:
    """Time a forward pass of the first batch, and note sizes in it."""
    device = next(qnn.parameters()).device
    part = slice(0, min(batch_size, len(data)))
    layers, units = qnn.layers(), qnn.units()
    skips = list(qnn.model.input_blocks)
    sizes: dict[nn.Module, int] = {}
    places: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        values = [value for value in (*args, *kwargs.values(), output) if isinstance(value, Tensor)]
        sizes[module] = sum(4 * value[0].numel() for value in values)
        if isinstance(module, QuantModule):
            places[module] = output[0].numel() // len(module.weight)

    watched = {*layers.values(), *units.values()}
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    hooks += [
        block.register_forward_hook(lambda block, _, output: sizes.update({block: 4 * output[0].numel()}))
        for block in skips
    ]
    try:
        qnn(*data.batch(part, device))  # the first call is slower
        _synchronize(device)
        began = time.perf_counter()
        qnn(*data.batch(part, device))
        _synchronize(device)
        seconds = (time.perf_counter() - began) / (part.stop - part.start)
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(
        seconds=seconds,
        unit_bytes=[sizes[unit] for unit in units.values()],
        layer_bytes=[sizes[layer] for layer in layers.values()],
        skip_bytes=sum(sizes[block] for block in skips),
        places=[places[layer] for layer in layers.values()],
        columns=[layer.weight[0].numel() for layer in layers.values()],
    )


def local_processes() -> int:
    """Return how many processes of this calibration share the machine's memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what there is -----------------------------------------------------------------------------------------


def check_estimate(expected: Estimate, cache: int, folder: Path, device: torch.device) -> None:
    """Log the estimate. Raise ValueError where memory, disk or the GPU's memory will not do.

    cache: bytes of activations that each process keeps in memory. folder: where the rest goes.
    """
    disk, free_disk = expected.on_disk(cache * local_processes()), shutil.disk_usage(_existing(folder)).free
    free_memory = available_memory()
    logger.info(
        "about %s, %.1f GiB more memory (%.1f available), %.1f GiB of disk (%.1f free)",
        _duration(expected.seconds),
        expected.memory / GIB,
        free_memory / GIB,
        disk / GIB,
        free_disk / GIB,
    )
    if disk > 0.95 * free_disk:
        raise ValueError(
            f"{disk / GIB:.1f} GiB of disk are needed in {str(folder)!r} and {free_disk / GIB:.1f} are free: "
            "use fewer --num_samples, a larger --cache_gb, or another --outdir"
        )
    if expected.memory > free_memory:
        raise ValueError(
            f"{expected.memory / GIB:.1f} GiB more memory are needed and {free_memory / GIB:.1f} are available: "
            "use a smaller --cache_gb or --batch_size, or with --rounding gptq fewer --samples_w"
        )
    if device.type == "cuda":
        check_gpu(expected.gpu_memory, available_gpu_memory(device))


def check_gpu(needed: int, free: int) -> None:
    """Log the bytes of the GPU's memory that are needed. Raise ValueError if fewer are free."""
    logger.info("%.1f GiB more of the GPU's memory (%.1f available)", needed / GIB, free / GIB)
    if needed > free:
        raise ValueError(
            f"{needed / GIB:.1f} GiB more of the GPU's memory are needed and {free / GIB:.1f} are available: "
            "use a smaller --batch_size, or --device cpu"
        )


def available_gpu_memory(device: torch.device) -> int:
    """Return the bytes that the GPU has left, together with those that torch holds and does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def available_memory() -> int:
    """Return the bytes of main memory that this process can get, by the system and by the limit of a container."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return available
    return min(available, limit - used)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
