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
from qdiff.quant_layer import Quantizer, UniformAffineQuantizer
from qdiff.quant_model import QuantModel

MOMENTUM = 0.95  # of running ranges
SAMPLED_VALUES = 2**16  # of an activation, for its range by mse


class Observer(nn.Module):
    """Stands in a quantizer's slot, hands its input on, and remembers what the range needs."""

    enabled = True  # attention computes its operands for us

    def __init__(self, quantizer: UniformAffineQuantizer, values_a_batch: int, seed: int, running: bool):
        super().__init__()
        self._quantizer = (quantizer,)
        self.running = running
        self.values_a_batch = values_a_batch
        self.generator = torch.Generator().manual_seed(seed)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.batch: list[Tensor] = []  # minimum and maximum of each call since the last batch
        self.drawn: list[Tensor] = []  # values of each call since the last batch
        self.values: list[Tensor] = []  # of the batches

    @property
    def quantizer(self) -> UniformAffineQuantizer:
        return self._quantizer[0]

    def forward(self, x: Tensor) -> Tensor:
        self.batch.append(torch.stack(x.detach().aminmax()).float().cpu())
        if self.quantizer.scale_method == "mse" and not self.running:
            self.drawn.append(self._draw(x.detach().flatten()).float().cpu())
        return x

    def _draw(self, values: Tensor) -> Tensor:
        chosen = torch.randint(len(values), (self.values_a_batch,), generator=self.generator)
        return values[chosen.to(values.device)]

    def end_batch(self) -> None:
        """Take in the extremes of a batch, which may have come in several calls."""
        if not self.batch:
            return
        extremes = torch.stack(self.batch)
        low, high = extremes[:, 0].min(), extremes[:, 1].max()
        self.batch.clear()
        if self.drawn:
            self.values.append(self._draw(torch.cat(self.drawn)) if len(self.drawn) > 1 else self.drawn[0])
            self.drawn.clear()
        if self.low is None:
            self.low, self.high = low, high
        elif self.running:
            self.low = self.low * MOMENTUM + low * (1 - MOMENTUM)
            self.high = self.high * MOMENTUM + high * (1 - MOMENTUM)
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def fit(self) -> None:
        """Set the quantizer's range from all that was seen. Raises ValueError if nothing was."""
        if self.low is None:
            raise ValueError("an activation was never computed: is the calibration data of this model?")
        if self.running:
            self.quantizer.set_range(self.low, self.high)
        else:  # the extremes belong to the data: the candidates are shrinkings of the full range
            self.quantizer.fit(torch.cat([self.low.view(1), self.high.view(1), *self.values]))


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

    In one pass with quantized weights and float activations. By the quantizers' own method, or with `running` by
    Q-Diffusion's averages of minimum and maximum over the batches. progress(samples) is called after each batch.
    """
    device = next(qnn.parameters()).device
    batches = math.ceil(len(data) / batch_size)
    with qnn.quant_state(True, False), _observed(qnn, math.ceil(SAMPLED_VALUES / batches), seed, running) as observers:
        for start in range(0, len(data), batch_size):
            part = slice(start, min(start + batch_size, len(data)))
            qnn(*data.batch(part, device))
            for observer in observers:
                observer.end_batch()
            progress(part.stop - part.start)
    for observer in observers:
        observer.fit()
    from_first_rank([value for observer in observers for value in observer.quantizer.buffers()])


@contextmanager
def _observed(qnn: QuantModel, values_a_batch: int, seed: int, running: bool) -> Iterator[list[Observer]]:
    """Within the block Observers stand in the slots of all activation quantizers."""
    quantizers: dict[str, Quantizer] = qnn.act_quantizers()
    observers = {
        name: Observer(quantizer, values_a_batch, seed + i, running)
        for i, (name, quantizer) in enumerate(quantizers.items())
    }
    try:
        for name, observer in observers.items():
            put_module(qnn, name, observer)
        yield list(observers.values())
    finally:
        for name, quantizer in quantizers.items():
            put_module(qnn, name, quantizer)
