"""Measure what a calibration does, on random inputs: forward passes, and two steps of learning for each unit."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.calibration.data import DataPlan
from dsdiff.calibration.peak import peak_memory
from qdiff.calibrate import Step
from qdiff.config import ReconConfig
from qdiff.finite import named
from qdiff.gptq import Grid, gptq_codes
from qdiff.observers import SAMPLED_VALUES
from qdiff.optimization import Samples
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.recomputation import recomputed
from qdiff.reconstruction import WEIGHTS, learn_rounding, learn_step_sizes
from qdiff.sensitivity import switch_gradients

PRODUCT = 1024  # side of the matrices whose product is timed
FITTED = 2**21  # numbers of the weight whose fitting is timed
SLOW = 1.0  # seconds that a sample takes in a model so large that a few samples tell how long many take
FEW = 4  # samples that are enough then
COLUMNS = 256  # of the weight that is rounded by GPTQ to time what a column takes


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass of the model. seconds: of a sample. begins, ends: seconds of a sample until each unit does so.

    memory: bytes at most, for `samples` at once.
    """

    seconds: float
    begins: Mapping[str, float]
    ends: Mapping[str, float]
    memory: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Passes with gradients. seconds: of a step of learning. memory: bytes at most, without what is captured."""

    seconds: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that a sample has in the model, without the dimension of samples.

    inputs, outputs: of each unit. layer_bytes: of the input and output of each quantized layer. skip_bytes: of what the
    encoder keeps for the decoder. places: outputs of each layer, per channel. columns: of each layer's weight.
    """

    inputs: Mapping[str, Sequence[tuple[int, ...]]]
    outputs: Mapping[str, tuple[int, ...]]
    layer_bytes: Sequence[int]
    skip_bytes: int
    places: Sequence[int]
    columns: Sequence[int]

    def unit_bytes(self, unit: str) -> int:
        """Return the bytes of a sample's inputs and output of a unit."""
        return sum(4 * torch.Size(shape).numel() for shape in (*self.inputs[unit], self.outputs[unit]))


# --- passes ------------------------------------------------------------------------------------------------


def random_batch(plan: DataPlan, samples: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return inputs of the UNet in the shapes of the calibration data."""
    x = torch.randn(samples, *plan.x, device=device)
    t = torch.full((samples,), 500.0, device=device)
    return (x, t) if plan.context is None else (x, t, torch.randn(samples, *plan.context, device=device))


@torch.no_grad()
def measure_sizes(qnn: QuantModel, plan: DataPlan) -> Sizes:
    """Return the shapes of one sample."""
    layers, units, blocks = qnn.layers(), qnn.units(), list(qnn.model.input_blocks)
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}  # of inputs, then of the output

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        values = [value for value in (*args, *kwargs.values(), output) if isinstance(value, Tensor)]
        shapes[module] = [tuple(value.shape[1:]) for value in values]

    watched = {*layers.values(), *units.values(), *blocks}
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    try:
        qnn(*random_batch(plan, 1, next(qnn.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    numbers = {module: [torch.Size(shape).numel() for shape in each] for module, each in shapes.items()}
    return Sizes(
        inputs={name: shapes[unit][:-1] for name, unit in units.items()},
        outputs={name: shapes[unit][-1] for name, unit in units.items()},
        layer_bytes=[4 * sum(numbers[layer]) for layer in layers.values()],
        skip_bytes=sum(4 * numbers[block][-1] for block in blocks),
        places=[numbers[layer][-1] // len(layer.weight) for layer in layers.values()],
        columns=[layer.weight[0].numel() for layer in layers.values()],
    )


@torch.no_grad()
def measure_pass(qnn: QuantModel, plan: DataPlan, samples: int) -> Pass:
    """Time a forward pass of so many samples, in the model's present state.

    Of a large model only FEW samples are passed: each of the rest takes as long and as much memory as the last of them.
    """
    device = next(qnn.parameters()).device
    half, seconds = _bytes_and_seconds(
        qnn, random_batch(plan, FEW // 2, device)
    )  # also the first call, which is slower
    tried = min(samples, FEW) if seconds > SLOW * (FEW // 2) else samples
    batch = random_batch(plan, tried, device)
    memory, _ = _bytes_and_seconds(qnn, batch)
    begins: dict[str, float] = {}
    ends: dict[str, float] = {}
    hooks = []
    for name, unit in qnn.units().items():
        hooks.append(unit.register_forward_pre_hook(lambda *_, name=name: begins.update({name: _now(device)})))
        hooks.append(unit.register_forward_hook(lambda *_, name=name: ends.update({name: _now(device)})))
    try:
        began = _now(device)
        qnn(*batch)
        ended = _now(device)
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(
        seconds=(ended - began) / tried,
        begins={name: (moment - began) / tried for name, moment in begins.items()},
        ends={name: (moment - began) / tried for name, moment in ends.items()},
        memory=memory + (samples - tried) * max(memory - half, 0) // (FEW - FEW // 2),
        samples=samples,
    )


def _bytes_and_seconds(qnn: QuantModel, batch: Sequence[Tensor]) -> tuple[int, float]:
    """Return the bytes that a forward pass takes at most, and its seconds."""
    device = next(qnn.parameters()).device
    began = _now(device)
    with peak_memory(device) as memory:
        qnn(*batch)
    return memory.most, _now(device) - began


@contextmanager
def placeholder_ranges(qnn: QuantModel) -> Iterator[None]:
    """Give all quantizers that have no range one of step 1 within the block: what they compute takes the same time."""
    slots = [
        (getattr(layer, name), (len(part), *[1] * (part.ndim - 1)))
        for layer in qnn.layers().values()
        for name, part in layer.weight_parts().items()
    ]
    slots += [(quantizer, ()) for quantizer in qnn.act_quantizers().values()]
    unset = [(quantizer, shape) for quantizer, shape in slots if not quantizer.is_set]
    before = [(quantizer, quantizer.delta, quantizer.zero_point) for quantizer, _ in unset]
    try:
        for quantizer, shape in unset:
            quantizer.set(torch.ones(shape), torch.zeros(shape))
        yield
    finally:
        for quantizer, delta, zero_point in before:
            quantizer.delta, quantizer.zero_point = delta, zero_point


def measure_probe(qnn: QuantModel, plan: DataPlan, samples: int) -> Learning:
    """Time the gradients by which inputs are ranked, for a sample; all ranges must be set. memory: of `samples`."""
    device = next(qnn.parameters()).device
    batch, generator = random_batch(plan, samples, device), torch.Generator().manual_seed(0)
    with peak_memory(device) as memory:  # also the first call, which is slower
        switch_gradients(qnn, batch, generator)
    began = _now(device)
    switch_gradients(qnn, batch, generator)
    return Learning(seconds=(_now(device) - began) / samples, memory=memory.most)


# --- learning ----------------------------------------------------------------------------------------------


def measure_learning(qnn: QuantModel, step: Step, sizes: Sizes, recon: ReconConfig) -> Learning:
    """Learn a unit for two steps from random samples, and put it back as it was. All ranges must be set."""
    device = next(qnn.parameters()).device
    unit, act = qnn.units()[step.unit], step.phase != WEIGHTS
    learn: Callable[..., Any] = learn_step_sizes if act else learn_rounding
    inputs = [torch.randn(recon.batch_size, *shape, device=device) for shape in sizes.inputs[step.unit]]
    target = torch.randn(recon.batch_size, *sizes.outputs[step.unit], device=device)
    samples, moments = Samples(inputs=inputs, target=target, device=device), []
    config = replace(recon, iters_w=2, iters_a=2)
    recompute = recomputed(unit) if config.grad_checkpoint else nullcontext()
    state = qnn.quant_state(True, act, dynamic=True)
    with named(f"measuring {step}"), _unlearned(unit), state, recompute, peak_memory(device) as memory:
        learn(unit, samples, config, 0, lambda _: moments.append(_now(device)))
    return Learning(seconds=moments[1] - moments[0], memory=memory.most)


@contextmanager
def _unlearned(unit: nn.Module) -> Iterator[None]:
    """Put back the weight quantizers and the step sizes of a unit at the end of the block."""
    layers = [module for module in unit.modules() if isinstance(module, QuantModule)]
    slots = [(layer, name, getattr(layer, name)) for layer in layers for name in layer.weight_parts()]
    steps = [(each, each.delta) for each in unit.modules() if isinstance(each, UniformAffineQuantizer)]
    try:
        yield
    finally:
        for layer, name, quantizer in slots:
            setattr(layer, name, quantizer)
        for quantizer, delta in steps:
            quantizer.delta = delta


# --- what takes time beside passes -------------------------------------------------------------------------


def fitting_seconds(qnn: QuantModel) -> float:
    """Return the time that the ranges of all weights take to fit, by that of a part of the largest weight."""
    weights = [layer.weight for layer in qnn.layers().values()]
    largest = max(weights, key=lambda weight: weight.numel()).detach().flatten(1)
    part = largest[: max(1, FITTED // largest.shape[1])]
    quantizer = UniformAffineQuantizer(
        qnn.config.weight_bit, channel_wise=True, scale_method=qnn.config.scale_method
    ).to(part.device)
    return _timed(lambda: quantizer.fit(part), part.device) / part.numel() * sum(each.numel() for each in weights)


def range_seconds(qnn: QuantModel) -> float:
    """Return the time that the range of an activation takes to fit, after its values were drawn."""
    values = torch.randn(SAMPLED_VALUES)
    quantizer = UniformAffineQuantizer(qnn.config.act_bit, scale_method=qnn.config.act_scale_method)
    return _timed(lambda: quantizer.fit(values), values.device)


@dataclass(frozen=True, kw_only=True)
class GptqSpeeds:
    """single, double: seconds of a multiplication and addition in matrix products. column: seconds of a column."""

    single: float
    double: float
    column: float


def measure_gptq(qnn: QuantModel) -> GptqSpeeds:
    """Time matrix products, and the rounding of a small weight."""
    device = next(qnn.parameters()).device
    seconds = []
    for dtype in (torch.float32, torch.float64):
        factor = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
        seconds.append(_timed(lambda factor=factor: torch.mm(factor, factor), device) / PRODUCT**3)
    weight = torch.randn(COLUMNS, COLUMNS, device=device)
    ones, part = torch.ones(COLUMNS, 1, device=device), torch.zeros(COLUMNS, dtype=torch.int64, device=device)
    grid = Grid(delta=ones, zero_point=0 * ones, part=part, high=15)
    hessian = torch.eye(COLUMNS, device=device)
    rounding = _timed(lambda: gptq_codes(weight, hessian, grid, damp=0.01, act_order=True), device)
    return GptqSpeeds(single=seconds[0], double=seconds[1], column=rounding / COLUMNS)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the shorter time of two calls: the first one may be slower."""
    times = []
    for _ in range(2):
        began = _now(device)
        call()
        times.append(_now(device) - began)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
