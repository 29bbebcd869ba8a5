"""Integer layers: linear layers and convolutions on integer codes, independent of the backend that multiplies.

Let c be the codes of the input (0..2^b - 1, zero point Z, step D) and q those of the weight (zero point z and step d of
each output channel). A layer computes

    y = D d sum (c - Z) (q - z) + bias          with the sum over the inputs of an output

The sum is exact in 32 bits. A convolution pads with c = Z, which stands for 0. Codes of more than 8 bits are two bytes,
and the layer is the sum of two (see `WideIntegerLayer`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.engine import fused_ops
from qdiff.engine.quant_params import QuantParams
from qdiff.quant_layer import FrozenQuantizer, Quantizer, QuantModule, SplitQuantModule, UniformAffineQuantizer


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The numbers that a backend makes an integer layer from.

    weight: q - z, int8 [outputs, inputs / groups, *kernel]. step: d, float32 [outputs]. bias: float32 [outputs] or
    None. params: the quantizer of the input. options: a convolution's stride, padding, dilation and groups; None for a
    linear layer.
    """

    weight: Tensor
    step: Tensor
    bias: Tensor | None
    params: QuantParams
    options: dict[str, Any] | None = None


def params_of(quantizer: Quantizer) -> QuantParams:
    """Return the numbers of a quantizer that has one range. Signed codes are shifted so that the lowest is 0."""
    low = quantizer.low
    return QuantParams(
        delta=float(quantizer.delta), zero_point=int(quantizer.zero_point) - low, high=quantizer.high - low
    )


class _FixedDtypes(nn.Module):
    """A module whose buffers keep their dtypes: `.half()` and the like move them, but a step must not be rounded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FixedDtypes":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class CodesLayer(_FixedDtypes):
    """A layer that computes from the codes of its input. params: the quantizer of that input."""

    def __init__(self, params: QuantParams):
        super().__init__()
        self.params = params

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, of any float dtype, and return the layer's output in that dtype."""
        return self.to_float(self.quantize(x), x.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of x, uint8, [2, ...] of more than 8 bits; see `fused_ops.quantize`."""
        return fused_ops.quantize(x, self.params)[0]

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the layer's output in `dtype`. codes: of its input, uint8."""
        raise NotImplementedError

    def to_codes(self, codes: Tensor, params: QuantParams) -> Tensor:
        """Return the codes of the layer's output, uint8. codes: of its input. params: the quantizer of its output.

        The float32 output is multiplied by 1 / delta, as in oneDNN's kernels, whereas `quantize` divides. Where the
        quotient is near a tie, the code may therefore differ by 1 from that of `quantize`.
        """
        scaled = self.to_float(codes, torch.float32).mul_(1 / params.delta).add_(params.zero_point)
        return scaled.round_().clamp_(0, params.high).to(torch.uint8)


class IntegerLayer(CodesLayer):
    """A layer that a backend made from a LayerSpec."""


MakeLayer = Callable[[LayerSpec], IntegerLayer]


class SplitIntegerLayer(nn.Module):
    """The sum of two layers: `first` on the first `split` channels of the input, `second` on the others."""

    def __init__(self, first: nn.Module, second: nn.Module, split: int):
        super().__init__()
        self.first, self.second, self.split = first, second, split

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, : self.split]) + self.second(x[:, self.split :])


class WideIntegerLayer(CodesLayer):
    """A layer whose input has more than 8 bits: the sum of a layer on the low bytes of its codes and one on the high.

    low, high: have the quantizers `params.halves()`; `low` has the bias. Both sums are exact; only their sum rounds, in
    float32.
    """

    def __init__(self, low: CodesLayer, high: CodesLayer, params: QuantParams):
        super().__init__(params)
        self.low, self.high = low, high

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = (layer.to_float(c, torch.float32) for layer, c in zip((self.low, self.high), codes, strict=True))
        return low.add_(high).to(dtype)


class OffsetIntegerLayer(CodesLayer):
    """A layer of 8-bit weights, whose q - z may not fit into int8.

    `layer` has the weights q - 128, which do fit, and one extra output with weights of 1, which is D sum (c - Z). This
    output times `offsets`, which are (128 - z) d, is added to the others. dim: the dimension of the outputs.
    """

    offsets: Tensor

    def __init__(self, layer: IntegerLayer, offsets: Tensor, dim: int):
        super().__init__(layer.params)
        self.layer, self.dim = layer, dim
        self.register_buffer("offsets", offsets)

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        # In float32, because the result may be a small difference of two large numbers.
        outputs, sums = self.layer.to_float(codes, torch.float32).split([len(self.offsets), 1], dim=self.dim)
        shape = [-1 if axis == self.dim % codes.ndim else 1 for axis in range(codes.ndim)]
        return torch.addcmul(outputs, sums, self.offsets.view(shape)).to(dtype)


# --- from a quantized layer --------------------------------------------------------------------------------


def integer_layer(layer: QuantModule, make: MakeLayer) -> nn.Module:
    """Return the integer layer of `layer`, made by the backend `make`.

    Raises ValueError if there is none: for float activations, weights of more than 8 bits, padding by name such as
    "same", and grouped convolutions whose weights do not fit into int8.
    """
    parts = [_part(layer, name, make) for name in layer.weight_parts()]
    return SplitIntegerLayer(parts[0], parts[1], layer.split) if isinstance(layer, SplitQuantModule) else parts[0]


def _part(layer: QuantModule, name: str, make: MakeLayer) -> nn.Module:
    """Return the integer layer of one weight quantizer; a split layer has two."""
    quantizer, act = getattr(layer, name), getattr(layer, name.replace("weight", "act"))
    if not isinstance(act, UniformAffineQuantizer):
        raise ValueError("activations are float: there is nothing to compute in whole numbers")
    if quantizer.n_bits > 8:
        raise ValueError(f"W{quantizer.n_bits}A{act.n_bits} does not fit into bytes: weights of 8 bits are the most")
    if isinstance(layer.options.get("padding"), str):
        raise ValueError(f"padding {layer.options['padding']!r}: there is no integer layer for it, give numbers")
    if not isinstance(quantizer, FrozenQuantizer):
        quantizer = FrozenQuantizer(quantizer, layer.weight_parts()[name])
    bias = layer.bias if name == "weight_quantizer" else None  # a split layer's first part has it
    spec = LayerSpec(
        weight=quantizer.whole_weight(),
        step=quantizer.delta.flatten().clone(),
        bias=None if bias is None else bias.detach().float().clone(),
        params=params_of(act),
        options=layer.options or None,
    )
    if not spec.params.is_wide:
        return _of_bytes(spec, quantizer, make)
    low, high = spec.params.halves()
    return WideIntegerLayer(
        _of_bytes(replace(spec, params=low), quantizer, make),
        _of_bytes(replace(spec, params=high, bias=None), quantizer, make),
        spec.params,
    )


def _of_bytes(spec: LayerSpec, quantizer: FrozenQuantizer, make: MakeLayer) -> CodesLayer:
    """Return the layer of an input whose codes are bytes."""
    return make(spec) if spec.weight.dtype == torch.int8 else _offset(spec, quantizer, make)


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
