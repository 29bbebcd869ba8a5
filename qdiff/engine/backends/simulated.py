"""Integer layers in plain PyTorch, for any device: the simulation, and the reference for the other backends."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.backends import onednn
from qdiff.engine.layers import IntegerLayer, LayerSpec
from qdiff.engine.quant_params import unsigned

EXACT = 2**24  # float32 holds all integers up to this one exactly


class SimulatedLayer(IntegerLayer):
    """An integer layer that holds whole numbers as floats.

    Sums are exact: in float32, or in float64 where they may become too large for it. On a CPU they are multiplied by
    the steps in the order of oneDNN's kernels there, so that a simulated layer and a OneDNNLayer are equal bit for bit
    wherever `onednn.step_order` knows that order. Convolutions of several groups, which UNets do not have, agree
    within 2e-7 of their largest output.
    """

    weight: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, spec: LayerSpec):
        super().__init__(spec.params)
        self.options = spec.options
        furthest = max(abs(spec.params.zero_point), abs(spec.params.high - spec.params.zero_point))
        largest = spec.weight.flatten(1).abs().sum(1, dtype=torch.int64).max() * furthest
        self.exact = torch.float32 if largest < EXACT else torch.float64
        self.register_buffer("weight", spec.weight)
        self.register_buffer("step", spec.step)
        self.register_buffer("bias", spec.bias)

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (-1,) if self.options is None else (-1, *[1] * (self.weight.ndim - 2))
        with torch.autocast(codes.device.type, enabled=False):  # which would round whole numbers
            sums = self._sums(
                unsigned(codes).to(self.exact) - self.params.zero_point, self.weight.to(self.exact)
            ).round()
        if codes.device.type == "cpu" and onednn.step_order(dtype) == "one by one":
            outputs = sums.float() * self.params.delta * self.step.view(shape)
        else:
            outputs = sums.float() * (self.step * self.params.delta).view(shape)
        outputs = outputs if self.bias is None else outputs + self.bias.view(shape)
        if outputs.ndim == 4:  # the kernels' order of memory: a norm that follows sums in it
            outputs = outputs.contiguous(memory_format=torch.channels_last)
        return outputs.to(dtype)

    def _sums(self, numbers: Tensor, weight: Tensor) -> Tensor:
        if self.options is None:
            return F.linear(numbers, weight)
        return (F.conv2d if weight.ndim == 4 else F.conv1d)(numbers, weight, **self.options)
