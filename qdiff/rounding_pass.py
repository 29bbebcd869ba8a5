"""One pass of the calibration samples through the model, in which GPTQ rounds each layer before it computes.

So a layer's inputs, quantized where their ranges are dynamic, come from the model quantized so far, and no sample
passes through a part of the model twice. Beside them the same samples pass through the float layers, [float; quantized]
in one batch, since their outputs are what the rounded layer aims at: it makes good what the layers before it got wrong,
as far as it can (Li et al. 2025, GPTAQ, arXiv 2504.02692). With `sym` there are only the float samples.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.calibration_set import CalibrationSet
from qdiff.config import ReconConfig
from qdiff.distributed import from_first_rank, rank, world_size
from qdiff.exchange import put_module
from qdiff.finite import is_finite, named
from qdiff.gptq import InputStatistics, output_of, round_layer
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import WEIGHTS, UnitReport


class RoundingLayer(nn.Module):
    """Take a layer's slot during the pass; round the layer once its inputs have come, and compute.

    name: the layer's. config: the settings of GPTQ. rounded(before, after, seconds) is called when the layer is
    rounded, with `round_layer`'s two errors; None leaves the layer as it is.
    """

    def __init__(
        self,
        name: str,
        layer: QuantModule,
        config: ReconConfig,
        rounded: Callable[[float, float, float], object] | None,
    ):
        super().__init__()
        self._layer = (layer,)  # in a tuple: not a submodule
        self.name = name
        self.config = config
        self.rounded = rounded

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self._layer
        if self.config.sym:
            self._round(layer, layer.quantized_input(x), None)
            return output_of(layer, x, layer.weight)
        exact, inexact = x.chunk(2)
        target = output_of(layer, exact, layer.weight)
        inexact = layer.quantized_input(inexact)
        self._round(layer, inexact, target)
        return torch.cat([target, output_of(layer, inexact, layer.quantized_weight())])

    def _round(self, layer: QuantModule, x: Tensor, target: Tensor | None) -> None:
        if self.rounded is None:
            return
        began = time.perf_counter()
        statistics = InputStatistics(layer, targets=target is not None)
        statistics.add(x, target)
        statistics.sum_over_processes()
        with named(self.name.removeprefix("model.")):
            before, after = round_layer(layer, statistics, damp=self.config.damp, act_order=self.config.act_order)
        from_first_rank([getattr(layer, name).packed for name in layer.weight_parts()])
        self.rounded(before, after, time.perf_counter() - began)


@torch.no_grad()
def round_units(
    qnn: QuantModel,
    data: CalibrationSet,
    config: ReconConfig,
    *,
    finished: int = 0,
    on_unit: Callable[[UnitReport], object] = lambda report: None,
) -> None:
    """Round the weights of a model's units by GPTQ and freeze them, all but the first `finished`, which are frozen.

    All ranges of weights must be fitted. config.samples_w samples of `data`, chosen at random, pass through the model
    at once; several processes share them. on_unit(report) is called when the last layer of a unit is rounded, in the
    order of `qnn.units()`; its errors are sums over the layers. Raises ValueError for fewer samples than processes, and
    where a number becomes NaN or infinite, with the layer's name.
    """
    chosen = data.subset(config.samples_w, config.seed)
    if len(chosen) < world_size():
        raise ValueError(f"{len(chosen)} samples are too few for {world_size()} processes: use fewer processes")
    units = list(qnn.units())[finished:]
    with qnn.quant_state(True, False, dynamic=True), _rounding(qnn, units, config, on_unit):
        arguments = chosen.batch(slice(rank(), None, world_size()), next(qnn.parameters()).device)
        eps = qnn(*(arguments if config.sym else (torch.cat([values, values]) for values in arguments)))
    if not is_finite(eps):
        raise ValueError("the output of the rounded model is NaN or infinite")


@contextmanager
def _rounding(
    qnn: QuantModel, units: list[str], config: ReconConfig, on_unit: Callable[[UnitReport], object]
) -> Iterator[None]:
    """Put RoundingLayers into the slots of all layers within the block; they round those of `units`.

    A rounded layer is back in its slot at once, since a pass calls each layer once, and `on_unit` finds it there.
    """
    layers = qnn.layers()
    try:
        for name, layer in layers.items():
            put_module(qnn, name, RoundingLayer(name, layer, config, None))
        for unit in units:
            own = {name: layer for name, layer in layers.items() if name == unit or name.startswith(f"{unit}.")}
            tally = _Tally(unit, len(own), on_unit)
            for name, layer in own.items():
                back = partial(put_module, qnn, name, layer)
                put_module(qnn, name, RoundingLayer(name, layer, config, partial(tally.add, back)))
        yield
    finally:
        for name, layer in layers.items():
            put_module(qnn, name, layer)


class _Tally:
    """The errors of the rounded layers of a unit, summed, and how many layers are left."""

    def __init__(self, unit: str, layers: int, on_unit: Callable[[UnitReport], object]):
        self.unit, self.left, self.on_unit = unit, layers, on_unit
        self.before = self.after = 0.0
        self.seconds = 0.0

    def add(self, back: Callable[[], object], before: float, after: float, seconds: float) -> None:
        """Count a rounded layer, and put it back; report the unit if it was the last."""
        back()
        self.left -= 1
        self.before += before
        self.after += after
        self.seconds += seconds
        if not self.left:
            errors = {"before": self.before, "after": self.after, "improved": self.after < self.before}
            self.on_unit(UnitReport(unit=self.unit, phase=WEIGHTS, seconds=self.seconds, **errors))
