"""Layers that keep their weights at few bits, and expand them each time they run: half the memory of W4, slower."""

from dataclasses import replace

import torch
from torch import Tensor

from qdiff.bitpack import pack, unpack
from qdiff.engine.layers import IntegerLayer, LayerSpec, MakeLayer, Range

BYTE = 8  # bits from which nothing is saved


def low_memory(make: MakeLayer) -> MakeLayer:
    """Makes the layers of `make`, each anew whenever it runs where its weight fits into less than a byte."""

    def build(spec: LayerSpec) -> IntegerLayer:
        return make(spec) if _bits(spec) >= BYTE else ExpandingLayer(spec, make)

    return build


def _bits(spec: LayerSpec) -> int:
    """That hold the weights of each output, counted from their lowest."""
    rows = spec.weight.flatten(1).int()
    return max(2, int((rows.amax(1) - rows.amin(1)).max()).bit_length())


class ExpandingLayer(IntegerLayer):
    """Holds the weight, less the lowest of each output, packed at its bits."""

    packed: Tensor
    lowest: Tensor

    def __init__(self, spec: LayerSpec, make: MakeLayer):
        super().__init__(spec)
        self.make, self.bits, self.shape = make, _bits(spec), tuple(spec.weight.shape)
        weight = spec.weight.short()
        lowest = weight.flatten(1).amin(1).view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("packed", pack(weight - lowest, self.bits))
        self.register_buffer("lowest", lowest.to(torch.int8))
        self.spec = replace(spec, weight=spec.weight[:0].clone(), step=None, bias=None)
        self.register_buffer("step", spec.step)
        self.register_buffer("bias", spec.bias)

    def product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.expanded().product(codes, dtype)

    def requantized(self, codes: Tensor, to: Range) -> Tensor:
        return self.expanded().requantized(codes, to)

    def expanded(self) -> IntegerLayer:
        """The layer that computes."""
        codes = unpack(self.packed, self.shape, self.bits)  # of less than 8 bits: their sum with the lowest is a byte
        weight = codes.view(torch.int8) + self.lowest
        return self.make(replace(self.spec, weight=weight, step=self.step, bias=self.bias))
