"""Reconstruction of a unit: its rounding, then its step sizes, so that it gives what the float unit gave.

BRECQ's (Li et al. 2021) in Q-Diffusion's setting: the unit is fed what the quantized model before it makes (or, with
`sym`, what the float model makes), and its target is the float unit's output on the float model's input. Weights are
learned by AdaRound, activations' step sizes by LSQ's gradient (Esser et al. 2020) through the rounding.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qdiff.adaptive_rounding import AdaRoundQuantizer, soft_rounding
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache, Progress, capture
from qdiff.config import ReconConfig
from qdiff.distributed import rank, sum_over_ranks, world_size
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule, UniformAffineQuantizer, lp_loss
from qdiff.quant_model import QuantModel, freeze_layer

Losses = list[float]


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What a reconstruction did. Errors are |output - target|^p over all samples, with hard roundings.

    improved: whether the learned state was better than the one it began with, and so kept.
    """

    unit: str
    phase: str  # weights or activations
    before: float
    after: float
    improved: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- the loop ----------------------------------------------------------------------------------------------


def reconstruct(
    forward: Callable[..., Tensor],
    inputs: list[Tensor],
    target: Tensor,
    parameters: list[Tensor],
    iters: int,
    lr: float,
    p: float,
    config: ReconConfig,
    seed: int,
    *,
    device: torch.device,
    regulariser: Callable[[int], Tensor] | None = None,
    cosine: bool = False,
    progress: Progress = lambda steps: None,
) -> Losses:
    """Learn `parameters` by Adam, so that forward(*inputs) approaches `target`; the loss of every step is returned.

    Each step takes config.batch_size samples, drawn by `seed` alike in all processes; each process works on its part
    of them, and gradients are averaged. `cosine` brings the learning rate to 0 along a half cosine.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iters) if cosine else None
    generator = torch.Generator().manual_seed(seed)
    size = min(config.batch_size, len(target))
    losses = []
    for step in range(iters):
        chosen = torch.randperm(len(target), generator=generator)[:size]
        mine = chosen[rank() :: world_size()]
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        if len(mine):
            batch = [values[mine].to(device) for values in inputs]
            loss = lp_loss(forward(*batch), target[mine].to(device), p) * (len(mine) / size)
            loss.backward()
        _sum_gradients(parameters, loss)
        if regulariser is not None:
            penalty = regulariser(step)
            if penalty.requires_grad:
                penalty.backward()
            loss = loss + penalty
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
        progress(1)
    return [float(loss) for loss in losses]


def _sum_gradients(parameters: list[Tensor], loss: Tensor) -> None:
    """Over all processes; each holds its share of the mean."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_over_ranks([*(parameter.grad for parameter in parameters), loss.data])


@torch.no_grad()
def mean_error(
    forward: Callable[..., Tensor],
    inputs: list[Tensor],
    target: Tensor,
    p: float,
    batch: int,
    device: torch.device,
) -> float:
    """lp_loss over all samples, `batch` at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for number, start in enumerate(range(0, len(target), batch)):
        if number % world_size() == rank():
            part = slice(start, start + batch)
            output = forward(*(values[part].to(device) for values in inputs))
            total += lp_loss(output, target[part].to(device), p).double().cpu() * len(output)
    sum_over_ranks([total])
    return float(total) / len(target)


def round_exponent(step: int, iters: int, config: ReconConfig) -> float | None:
    """b of the regulariser at a step; None while it warms up. Linear from b_start to b_end (AdaRound, eq. 24)."""
    warm_up = config.warmup * iters
    if step < warm_up:
        return None
    share = (step - warm_up) / max(iters - warm_up, 1)
    return config.b_end + (config.b_start - config.b_end) * max(0.0, 1 - share)


def round_penalty(quantizers: list[AdaRoundQuantizer], b: float | None, weight: float) -> Tensor:
    """weight * sum of 1 - |2 h(alpha) - 1|^b: least where every h is 0 or 1. Zero while b is None."""
    if b is None:
        return torch.zeros((), device=quantizers[0].alpha.device)
    return weight * sum((1 - (2 * q.soft_targets() - 1).abs().pow(b)).sum() for q in quantizers)


# --- the two things to learn -------------------------------------------------------------------------------


def learn_rounding(
    unit: nn.Module, inputs: list[Tensor], target: Tensor, config: ReconConfig, seed: int, progress: Progress
) -> tuple[float, float, bool]:
    """AdaRound on all weights of `unit`, which end up frozen: (error before, error after, improved)."""
    layers = [module for module in unit.modules() if isinstance(module, QuantModule)]
    device = layers[0].weight.device
    before = mean_error(unit, inputs, target, 2.0, config.batch_size, device)
    nearest = [(layer, name, getattr(layer, name)) for layer in layers for name in layer.weight_parts()]
    adaptive = []
    for layer, name, quantizer in nearest:
        adaptive.append(AdaRoundQuantizer.from_uniform(quantizer, layer.weight_parts()[name]))
        setattr(layer, name, adaptive[-1])
    improved = False
    try:
        with soft_rounding(unit):
            reconstruct(
                unit,
                inputs,
                target,
                [quantizer.alpha for quantizer in adaptive],
                config.iters_w,
                config.lr_w,
                2.0,
                config,
                seed,
                device=device,
                regulariser=lambda step: round_penalty(
                    adaptive, round_exponent(step, config.iters_w, config), config.weight
                ),
                progress=progress,
            )
        after = mean_error(unit, inputs, target, 2.0, config.batch_size, device)
        improved = after < before
    finally:
        if not improved:
            for layer, name, quantizer in nearest:
                setattr(layer, name, quantizer)
    for layer in layers:
        freeze_layer(layer)
    return before, after if improved else before, improved


def learn_step_sizes(
    unit: nn.Module, inputs: list[Tensor], target: Tensor, config: ReconConfig, seed: int, progress: Progress
) -> tuple[float, float, bool]:
    """LSQ on the step sizes of all activations of `unit`: (error before, error after, improved).

    What is learned is log(delta / delta at the start): delta stays positive, and one learning rate suits the steps of
    8-bit inputs and of a 16-bit softmax, which lie three orders of magnitude apart.
    """
    quantizers = [q for q in unit.modules() if isinstance(q, UniformAffineQuantizer) and not q.channel_wise]
    device = quantizers[0].delta.device
    before = mean_error(unit, inputs, target, config.p, config.batch_size, device)
    start = [quantizer.delta for quantizer in quantizers]
    logs = [torch.zeros_like(delta, requires_grad=True) for delta in start]

    def forward(*batch: Tensor) -> Tensor:
        for quantizer, delta, log in zip(quantizers, start, logs, strict=True):
            quantizer.delta = delta * log.exp()
        return unit(*batch)

    try:
        reconstruct(
            forward,
            inputs,
            target,
            logs,
            config.iters_a,
            config.lr,
            config.p,
            config,
            seed,
            device=device,
            cosine=True,
            progress=progress,
        )
        for quantizer, delta, log in zip(quantizers, start, logs, strict=True):
            quantizer.delta = (delta * log.exp()).detach()
        after = mean_error(unit, inputs, target, config.p, config.batch_size, device)
    except BaseException:
        _put_back(quantizers, start)
        raise
    if not after < before:
        _put_back(quantizers, start)
        return before, before, False
    return before, after, True


def _put_back(quantizers: list[UniformAffineQuantizer], deltas: list[Tensor]) -> None:
    for quantizer, delta in zip(quantizers, deltas, strict=True):
        quantizer.delta = delta


# --- one unit of a model -----------------------------------------------------------------------------------


def block_reconstruction(
    qnn: QuantModel, name: str, data: CalibrationSet, config: ReconConfig, **options
) -> UnitReport:
    """Reconstruct the block `name`; see `unit_reconstruction`."""
    if not isinstance(qnn.units().get(name), BaseQuantBlock):
        raise ValueError(f"{name!r} is no block of this model")
    return unit_reconstruction(qnn, name, data, config, **options)


def layer_reconstruction(
    qnn: QuantModel, name: str, data: CalibrationSet, config: ReconConfig, **options
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

    Units come in the order of `qnn.units()`, first all weights, then all activations. The result depends on the
    model's state, the data and config.seed alone. batch_size: samples a forward pass of the model. progress(n) is
    called as n samples are captured, twice over all of them, and as n steps are done. The model's other units and its
    state are left as they are; requires_grad is off for all its parameters afterwards.
    """
    if phase not in ("weights", "activations"):
        raise ValueError(f"phase is {phase!r}: it must be weights or activations")
    began = time.perf_counter()
    unit = qnn.units()[name]
    qnn.requires_grad_(False)
    act = phase == "activations"
    learn = learn_step_sizes if act else learn_rounding
    options = {"batch_size": batch_size, "cache": cache, "progress": progress}
    try:
        with qnn.quant_state(False, False):
            (target,) = capture(qnn, unit, data, output=True, **options)
        with qnn.quant_state(not config.sym, act and not config.sym):
            inputs = capture(qnn, unit, data, **options)
        seed = zlib.crc32(f"{config.seed} {phase} {name}".encode())
        with qnn.quant_state(True, act), _eval_mode(unit), recomputed(unit, config.grad_checkpoint):
            before, after, improved = learn(unit, inputs, target, config, seed, progress)
    finally:
        cache.clear()
    return UnitReport(
        unit=name,
        phase=phase,
        before=before,
        after=after,
        improved=improved,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def recomputed(unit: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within the block the parts of a unit keep no activations for the backward pass, and compute them anew.

    One part at a time: attention, feed-forward, each half of a residual block. Only their inputs are kept.
    """
    parts = [part for part in unit.children() if enabled and any(True for _ in part.parameters())]
    try:
        for part in parts:
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)
        yield
    finally:
        for part in parts:
            part.__dict__.pop("forward", None)


@contextmanager
def _eval_mode(unit: nn.Module) -> Iterator[None]:
    training = unit.training
    unit.eval()
    try:
        yield
    finally:
        unit.train(training)
