"""Fit the ranges of activations to what passes through the model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Progress
from qdiff.distributed import from_first_rank
from qdiff.exchange import put_module
from qdiff.finite import named
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer

MOMENTUM = 0.95  # share of the earlier batches in a running range
SAMPLED_VALUES = 2**16  # values of an activation that its range by mse is fitted to


class Observer(nn.Module):
    """Take a quantizer's slot, return inputs unchanged, and record the statistics from which its range is fitted.

    values_a_batch: how many values of each batch are drawn, by `seed`, for a range by mse. running: average the
    extremes of the batches, as Q-Diffusion does, instead of taking the extremes of all.
    """

    enabled = True  # quantized attention computes its operands only while their quantizers are enabled

    def __init__(self, quantizer: UniformAffineQuantizer, values_a_batch: int, seed: int, running: bool):
        super().__init__()
        self._quantizer = (quantizer,)  # in a tuple: not a submodule
        self.running = running
        self.values_a_batch = values_a_batch
        self.generator = torch.Generator().manual_seed(seed)
        self.extremes: tuple[Tensor, Tensor] | None = None  # minimum and maximum of all batches
        self.calls: list[Tensor] = []  # minimum and maximum of each call since the last batch ended
        self.drawn: list[Tensor] = []  # values of each call since the last batch ended
        self.values: list[Tensor] = []  # values of each batch

    @property
    def quantizer(self) -> UniformAffineQuantizer:
        """The quantizer in whose slot this observer stands."""
        return self._quantizer[0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.stack(x.detach().aminmax()).float().cpu())
        if self.quantizer.scale_method == "mse" and not self.running:
            self.drawn.append(self._draw(x.detach().flatten()).float().cpu())
        return x

    def _draw(self, values: Tensor) -> Tensor:
        chosen = torch.randint(len(values), (self.values_a_batch,), generator=self.generator)
        return values[chosen.to(values.device)]

    def end_batch(self) -> None:
        """Merge the calls since the last batch into one batch: attention may call a quantizer several times in it."""
        if not self.calls:
            return
        calls = torch.stack(self.calls)
        low, high = calls[:, 0].min(), calls[:, 1].max()
        self.calls.clear()
        if self.drawn:
            self.values.append(self._draw(torch.cat(self.drawn)) if len(self.drawn) > 1 else self.drawn[0])
            self.drawn.clear()
        if self.extremes is not None:
            old_low, old_high = self.extremes
            if self.running:
                low = old_low * MOMENTUM + low * (1 - MOMENTUM)
                high = old_high * MOMENTUM + high * (1 - MOMENTUM)
            else:
                low, high = torch.minimum(old_low, low), torch.maximum(old_high, high)
        self.extremes = (low, high)

    @property
    def finite(self) -> bool:
        """False if a batch held NaN or infinite values."""
        return self.extremes is None or all(math.isfinite(value) for value in self.extremes)

    def fit(self) -> None:
        """Set the quantizer's range from all batches. Raises ValueError if there was none."""
        if self.extremes is None:
            raise ValueError("an activation was never computed: is the calibration data of this model?")
        low, high = self.extremes
        if self.running:
            self.quantizer.set_range(low, high)
        else:  # the extremes are part of the data, as the search by mse shrinks the full range
            self.quantizer.fit(torch.cat([low.view(1), high.view(1), *self.values]))


@torch.no_grad()
def fit_activations(
    qnn: QuantModel,
    data: CalibrationSet,
    batch_size: int,
    *,
    running: bool = False,
    seed: int = 0,
    progress: Progress = lambda samples: None,
) -> None:
    """Fit the ranges of all activations, attention operands included, to the whole of `data`.

    The data passes through the model once, with quantized weights and float activations. Ranges are fitted by each
    quantizer's own method, or with `running` to Q-Diffusion's running averages of each batch's minimum and maximum.
    These forget slowly, so the samples come in random order: in that of timesteps the first ones would decide.
    batch_size: samples per forward pass. seed: for that order, and for the values drawn for ranges by mse. progress(n)
    is called when n more samples are done. Raises ValueError, which names the activation, if one is never computed, or
    is NaN or infinite.
    """
    if running:
        data = data.shuffled(seed)
    device = next(qnn.parameters()).device
    batches = math.ceil(len(data) / batch_size)
    with qnn.quant_state(True, False), _observed(qnn, math.ceil(SAMPLED_VALUES / batches), seed, running) as observers:
        for start in range(0, len(data), batch_size):
            part = slice(start, min(start + batch_size, len(data)))
            qnn(*data.batch(part, device))
            for name, observer in observers.items():
                observer.end_batch()
                if not observer.finite:
                    first, last = data.name(part.start), data.name(part.stop - 1)
                    raise ValueError(f"{name}: its input is NaN or infinite in one of {first} to {last}")
            progress(part.stop - part.start)
    for name, observer in observers.items():
        with named(name):
            observer.fit()
    from_first_rank([value for observer in observers.values() for value in observer.quantizer.buffers()])


@contextmanager
def _observed(qnn: QuantModel, values_a_batch: int, seed: int, running: bool) -> Iterator[dict[str, Observer]]:
    """Put Observers into the slots of all activation quantizers, within the block."""
    quantizers = {name: q for name, q in qnn.act_quantizers().items() if isinstance(q, UniformAffineQuantizer)}
    observers = {
        name: Observer(quantizer, values_a_batch, seed + i, running)
        for i, (name, quantizer) in enumerate(quantizers.items())
    }
    try:
        for name, observer in observers.items():
            put_module(qnn, name, observer)
        yield observers
    finally:
        for name, quantizer in quantizers.items():
            put_module(qnn, name, quantizer)
