"""Layers that keep their weights packed at few bits and unpack them at each call: less memory, but slower."""

import torch
from torch import Tensor

from qdiff.bitpack import pack, unpack
from qdiff.engine.layers import IntegerLayer, LayerSpec, MakeLayer
from qdiff.engine.quant_params import QuantParams

BYTE = 8  # bits


def expanding(make: MakeLayer) -> MakeLayer:
    """Return a backend whose layers keep weights of under 8 bits packed, and are made by `make` at each call.

    At 4 bits a layer takes half the memory. Weights that need 8 bits go to `make` as they are.
    """

    def build(spec: LayerSpec) -> IntegerLayer:
        return make(spec) if _bits(spec) >= BYTE else ExpandingLayer(spec, make)

    return build


def _bits(spec: LayerSpec) -> int:
    """Return the bits that the difference of any weight from the lowest weight of its output needs, 2 or more."""
    rows = spec.weight.flatten(1).int()
    return max(2, int((rows.amax(1) - rows.amin(1)).max()).bit_length())


class ExpandingLayer(IntegerLayer):
    """A layer that holds the lowest weight of each output, and packed the differences of the others from it."""

    packed: Tensor
    lowest: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, spec: LayerSpec, make: MakeLayer):
        super().__init__(spec.params)
        self.make, self.bits, self.shape = make, _bits(spec), tuple(spec.weight.shape)
        weight = spec.weight.short()
        lowest = weight.flatten(1).amin(1).view(-1, *[1] * (weight.ndim - 1))
        self.register_buffer("packed", pack(weight - lowest, self.bits))
        self.register_buffer("lowest", lowest.to(torch.int8))
        self.register_buffer("step", spec.step)
        self.register_buffer("bias", spec.bias)
        self.options = spec.options

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.expanded().to_float(codes, dtype)

    def to_codes(self, codes: Tensor, params: QuantParams) -> Tensor:
        return self.expanded().to_codes(codes, params)

    def expanded(self) -> IntegerLayer:
        """Unpack the weight, and return the layer that computes with it."""
        differences = unpack(self.packed, self.shape, self.bits)  # of 7 bits at most: the sum below fits into a byte
        weight = differences.view(torch.int8) + self.lowest
        spec = LayerSpec(weight=weight, step=self.step, bias=self.bias, params=self.params, options=self.options)
        return self.make(spec)
