"""A layer on integers, apart from what computes it.

With the codes c of an input (0..2^b - 1, zero point Z, step D) and the codes q of its weight (zero point z and step d
of each output channel), a layer is

    y = D d sum (c - Z) (q - z) + bias          summed over the inputs of an output

in whole numbers up to the last product: the sum is exact in 32 bits. Zero padding of a convolution is c = Z.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.engine import fused_ops
from qdiff.engine.fused_ops import Codes, Range
from qdiff.quant_layer import FrozenQuantizer, Quantizer, QuantModule, SplitQuantModule, UniformAffineQuantizer


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A layer, as numbers.

    weight: int8 [outputs, inputs / groups, *kernel], q - z. step: float32 [outputs], d. bias: float32 [outputs] or
    None. delta, zero_point, high: D, Z and 2^b - 1 of the input. options: stride, padding, dilation and groups of a
    convolution, None for a linear layer.
    """

    weight: Tensor
    step: Tensor
    bias: Tensor | None
    delta: float
    zero_point: int
    high: int
    options: dict[str, Any] | None = None


def range_of(quantizer: Quantizer) -> Range:
    """Of a quantizer with one range. Codes start at 0, signed ones are moved up."""
    low = quantizer.low
    return Range(delta=float(quantizer.delta), zero_point=int(quantizer.zero_point) - low, high=quantizer.high - low)


class _FixedDtypes(nn.Module):
    """`.half()` and the like move its tensors, but do not cast them: steps would lose their precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FixedDtypes":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class CodesLayer(_FixedDtypes):
    """A layer whose float input is quantized first: `range`: of that input."""

    def __init__(self, range: Codes):
        super().__init__()
        self.delta, self.zero_point, self.high = range.delta, range.zero_point, range.high

    def forward(self, x: Tensor) -> Tensor:
        """Of x in any float dtype, in its dtype."""
        return self.product(self.quantize(x), x.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x, uint8: those of UniformAffineQuantizer, bit for bit, of finite x. NaN has no code."""
        return fused_ops.quantize(x, self)[0]

    def product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's output in `dtype`, of the codes of its input."""
        raise NotImplementedError

    def requantized(self, codes: Tensor, to: Range) -> Tensor:
        """The layer's output as codes for what follows, of the codes of its input. It is not rounded in between.

        As kernels do it, with a product by 1 / delta; codes may differ from those of a division where that is a tie.
        """
        scaled = self.product(codes, torch.float32).mul_(1 / to.delta).add_(to.zero_point)
        return scaled.round_().clamp_(0, to.high).to(torch.uint8)


class IntegerLayer(CodesLayer):
    """What an engine makes of a LayerSpec: the product is one of whole numbers."""


MakeLayer = Callable[[LayerSpec], IntegerLayer]


class SplitIntegerLayer(nn.Module):
    """The sum of two layers, of the first `split` channels of their input and of the rest."""

    def __init__(self, first: nn.Module, second: nn.Module, split: int):
        super().__init__()
        self.first, self.second, self.split = first, second, split

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, : self.split]) + self.second(x[:, self.split :])


class OffsetIntegerLayer(CodesLayer):
    """For weights of which q - z does not fit into a byte: q - 128 does, and 128 - z times the sum of c - Z is added.

    That sum is one more output, with a weight of ones.
    """

    offsets: Tensor

    def __init__(self, layer: IntegerLayer, offsets: Tensor, dim: int):
        super().__init__(layer)
        self.layer, self.dim = layer, dim
        self.register_buffer("offsets", offsets)

    def product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        # In float32: two large numbers may differ by a small one.
        outputs, sums = self.layer.product(codes, torch.float32).split([len(self.offsets), 1], dim=self.dim)
        shape = [-1 if axis == self.dim % codes.ndim else 1 for axis in range(codes.ndim)]
        return torch.addcmul(outputs, sums, self.offsets.view(shape)).to(dtype)


# --- from a quantized layer --------------------------------------------------------------------------------


def integer_layer(layer: QuantModule, make: MakeLayer) -> nn.Module:
    """`layer` in whole numbers; `make` makes the layers of an engine. Raises ValueError for what does not fit."""
    parts = [_part(layer, name, make) for name in layer.weight_parts()]
    return SplitIntegerLayer(*parts, layer.split) if isinstance(layer, SplitQuantModule) else parts[0]


def _part(layer: QuantModule, name: str, make: MakeLayer) -> nn.Module:
    quantizer, act = getattr(layer, name), getattr(layer, name.replace("weight", "act"))
    if not isinstance(act, UniformAffineQuantizer):
        raise ValueError("activations are float: there is nothing to compute in whole numbers")
    if max(act.n_bits, quantizer.n_bits) > 8:
        raise ValueError(f"W{quantizer.n_bits}A{act.n_bits} does not fit into bytes: 8 bits are the most that do")
    if not isinstance(quantizer, FrozenQuantizer):
        quantizer = FrozenQuantizer(quantizer, layer.weight_parts()[name])
    if isinstance(layer.options.get("padding"), str):
        raise ValueError(f"padding {layer.options['padding']!r}: there is no integer layer for it, give numbers")
    bias = layer.bias if name == "weight_quantizer" else None  # of a split layer, the first part has it
    spec = LayerSpec(
        weight=quantizer.codes() - quantizer.zero_point,
        step=quantizer.delta.flatten().clone(),
        bias=None if bias is None else bias.detach().float().clone(),
        options=layer.options or None,
        **asdict(range_of(act)),
    )
    if spec.weight.min() >= -128 and spec.weight.max() <= 127:
        return make(replace(spec, weight=spec.weight.to(torch.int8)))
    return _offset(spec, quantizer, make)


def _offset(spec: LayerSpec, quantizer: FrozenQuantizer, make: MakeLayer) -> OffsetIntegerLayer:
    if spec.options and spec.options["groups"] > 1:
        raise ValueError("a grouped convolution with weights of 8 bits: there is no integer layer for it")
    weight = quantizer.codes() - 128
    wider = replace(
        spec,
        weight=torch.cat([weight, torch.ones_like(weight[:1])]).to(torch.int8),
        step=torch.cat([spec.step, torch.ones_like(spec.step[:1])]),
        bias=None if spec.bias is None else torch.cat([spec.bias, torch.zeros_like(spec.bias[:1])]),
    )
    offsets = (128 - quantizer.zero_point.flatten()) * spec.step
    return OffsetIntegerLayer(make(wider), offsets, 1 if spec.options else -1)
