"""Reconstruction: learn the rounding, then the step sizes of a unit, so that it computes what the float unit does.

This is BRECQ (Li et al. 2021) in Q-Diffusion's setting. The unit's input comes from the quantized model (with `sym`,
from the float model), and its target is the float unit's output on the float model's input. AdaRound learns the
rounding of weights; LSQ's gradient through the rounding (Esser et al. 2020) learns the step sizes of activations.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.adaptive_rounding import AdaRoundQuantizer, round_exponent, round_penalty, soft_rounding
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache, Progress, capture
from qdiff.config import ReconConfig
from qdiff.optimization import AdamSettings, Samples, mean_error, minimize
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, freeze_layer
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.recomputation import recomputed

WEIGHTS, ACTIVATIONS = PHASES = ("weights", "activations")
WEIGHTS_P = 2.0  # exponent of the loss by which roundings are learned


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """The outcome of a reconstruction.

    phase: "weights" or "activations". before, after: errors |output - target|^p over all samples, with hard roundings.
    improved: True if the learned state was better than the initial one and was kept. seconds: wall time.
    """

    unit: str
    phase: str
    before: float
    after: float
    improved: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


# --- weights, and activations ------------------------------------------------------------------------------


def learn_rounding(
    unit: nn.Module, samples: Samples, config: ReconConfig, seed: int, progress: Progress
) -> tuple[float, float]:
    """Learn the rounding of all weights of `unit` by AdaRound, and freeze them. Return the errors before and after.

    If learning does not lower the error, weights are rounded to nearest, and both errors are equal.
    """
    layers = [module for module in unit.modules() if isinstance(module, QuantModule)]
    before = mean_error(unit, samples, WEIGHTS_P, config.batch_size)
    nearest = [(layer, name, getattr(layer, name)) for layer in layers for name in layer.weight_parts()]
    adaptive = [
        AdaRoundQuantizer.from_uniform(quantizer, layer.weight_parts()[name]) for layer, name, quantizer in nearest
    ]

    def regularizer(step: int) -> Tensor:
        return round_penalty(adaptive, round_exponent(step, config.iters_w, config), config.weight)

    settings = AdamSettings(steps=config.iters_w, lr=config.lr_w, p=WEIGHTS_P, batch_size=config.batch_size, seed=seed)
    after = before
    try:
        for (layer, name, _), quantizer in zip(nearest, adaptive, strict=True):
            setattr(layer, name, quantizer)
        with soft_rounding(unit):
            alphas: list[Tensor] = [quantizer.alpha for quantizer in adaptive]
            minimize(unit, samples, alphas, settings, regularizer=regularizer, progress=progress)
        after = mean_error(unit, samples, WEIGHTS_P, config.batch_size)
    finally:
        if not after < before:
            for layer, name, quantizer in nearest:
                setattr(layer, name, quantizer)
    for layer in layers:
        freeze_layer(layer)
    return before, min(before, after)


def step_sizes(unit: nn.Module) -> list[UniformAffineQuantizer]:
    """Return the quantizers of activations of a unit whose step sizes can be learned: those that are not dynamic."""
    return [q for q in unit.modules() if isinstance(q, UniformAffineQuantizer) and not q.channel_wise]


def learn_step_sizes(
    unit: nn.Module, samples: Samples, config: ReconConfig, seed: int, progress: Progress
) -> tuple[float, float]:
    """Learn the step sizes of all activations of `unit` by LSQ. Return the errors before and after.

    The logarithm of delta / (delta at the start) is learned. Thus delta stays positive, and one learning rate suits
    both 8-bit inputs and a 16-bit softmax, whose steps differ by three orders of magnitude. If learning does not lower
    the error, step sizes stay as they were, and both errors are equal.
    """
    quantizers = step_sizes(unit)
    before = mean_error(unit, samples, config.p, config.batch_size)
    start = [quantizer.delta for quantizer in quantizers]
    logs = [torch.zeros_like(delta, requires_grad=True) for delta in start]

    def put(deltas: list[Tensor]) -> None:
        for quantizer, delta in zip(quantizers, deltas, strict=True):
            quantizer.delta = delta

    def learned() -> list[Tensor]:
        return [delta * log.exp() for delta, log in zip(start, logs, strict=True)]

    def forward(*batch: Tensor) -> Tensor:
        put(learned())
        return unit(*batch)

    settings = AdamSettings(
        steps=config.iters_a, lr=config.lr, p=config.p, batch_size=config.batch_size, seed=seed, cosine=True
    )
    after = before
    try:
        minimize(forward, samples, logs, settings, progress=progress)
        put([delta.detach() for delta in learned()])
        after = mean_error(unit, samples, config.p, config.batch_size)
    finally:
        if not after < before:
            put(start)
    return before, min(before, after)


# --- one unit of a model -----------------------------------------------------------------------------------


def block_reconstruction(
    qnn: QuantModel, name: str, data: CalibrationSet, config: ReconConfig, **options: Any
) -> UnitReport:
    """Reconstruct the block `name`; see `unit_reconstruction`."""
    if not isinstance(qnn.units().get(name), BaseQuantBlock):
        raise ValueError(f"{name!r} is no block of this model")
    return unit_reconstruction(qnn, name, data, config, **options)


def layer_reconstruction(
    qnn: QuantModel, name: str, data: CalibrationSet, config: ReconConfig, **options: Any
) -> UnitReport:
    """Reconstruct the layer `name`, which is outside of blocks; see `unit_reconstruction`."""
    if not isinstance(qnn.units().get(name), QuantModule):
        raise ValueError(f"{name!r} is no layer of this model outside of its blocks")
    return unit_reconstruction(qnn, name, data, config, **options)


def unit_reconstruction(
    qnn: QuantModel,
    name: str,
    data: CalibrationSet,
    config: ReconConfig,
    *,
    phase: str,
    cache: Cache,
    batch_size: int = 8,
    progress: Progress = lambda steps: None,
) -> UnitReport:
    """Learn the roundings (`phase` "weights") or the step sizes ("activations") of one unit of the model.

    Inputs with dynamic ranges are quantized in both phases, others in the second.
    Learn the units in the order of `qnn.units()`: first the weights of all, then the activations of all. The result
    depends only on the model's state, the data and `config`. batch_size: samples per forward pass of the model.
    progress(n) is called when n more samples are captured, once for inputs and once for targets, and when n more steps
    are done. The model's other units and its state are left as they are; requires_grad is off for all its parameters
    afterwards. Raises ValueError for an unknown phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}: it must be {' or '.join(PHASES)}")
    began = time.perf_counter()
    unit = qnn.units()[name]
    device = next(qnn.parameters()).device
    qnn.requires_grad_(False)
    act = phase == ACTIVATIONS
    learn: Callable[..., tuple[float, float]] = learn_step_sizes if act else learn_rounding
    seed = zlib.crc32(f"{config.seed} {phase} {name}".encode())
    try:
        with qnn.quant_state(False, False):
            (target,) = capture(qnn, unit, data, batch_size, cache, output=True, progress=progress)
        with qnn.quant_state(not config.sym, act and not config.sym, dynamic=not config.sym):
            inputs = capture(qnn, unit, data, batch_size, cache, progress=progress)
        samples = Samples(inputs=inputs, target=target, device=device)
        recompute = recomputed(unit) if config.grad_checkpoint else nullcontext()
        with qnn.quant_state(True, act, dynamic=True), _eval_mode(unit), recompute:
            before, after = learn(unit, samples, config, seed, progress)
    finally:
        cache.clear()
    seconds = time.perf_counter() - began
    return UnitReport(unit=name, phase=phase, before=before, after=after, improved=after < before, seconds=seconds)


@contextmanager
def _eval_mode(unit: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in unit.modules()]
    unit.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
