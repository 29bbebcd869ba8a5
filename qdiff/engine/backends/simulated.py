"""Integer layers in plain PyTorch, for any device: what the simulation runs, and what the others are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.layers import IntegerLayer, LayerSpec

EXACT = 2**24  # up to which float32 holds all whole numbers


class ReferenceLayer(IntegerLayer):
    """Whole numbers as floats. Sums are exact, in float32 or, where they may become too large for it, in float64."""

    weight: Tensor
    step: Tensor

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.options = spec.options
        furthest = max(abs(spec.zero_point), abs(spec.high - spec.zero_point))
        largest = spec.weight.flatten(1).abs().sum(1, dtype=torch.int64).max() * furthest
        self.exact = torch.float32 if largest < EXACT else torch.float64
        self.register_buffer("weight", spec.weight)
        self.register_buffer("step", spec.step * spec.delta)
        self.register_buffer("bias", spec.bias)

    def product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (-1,) if self.options is None else (-1, *[1] * (self.weight.ndim - 2))
        with torch.autocast(codes.device.type, enabled=False):  # whole numbers are not to be rounded
            sums = self._sums(codes.to(self.exact) - self.zero_point, self.weight.to(self.exact)).round()
        outputs = sums.float() * self.step.view(shape)
        outputs = outputs if self.bias is None else outputs + self.bias.view(shape)
        if outputs.ndim == 4:  # as the kernels lay them out: a norm that follows sums in the order of memory
            outputs = outputs.contiguous(memory_format=torch.channels_last)
        return outputs.to(dtype)

    def _sums(self, numbers: Tensor, weight: Tensor) -> Tensor:
        if self.options is None:
            return F.linear(numbers, weight)
        return (F.conv2d if weight.ndim == 4 else F.conv1d)(numbers, weight, **self.options)
