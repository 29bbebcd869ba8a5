"""Integer layers: linear layers and convolutions on integer codes, independent of the backend that multiplies.

Let c be the codes of the input (0..2^b - 1, zero point Z, step D) and q those of the weight (zero point z and step d of
each output channel). A layer computes

    y = D d sum (c - Z) (q - z) + bias          with the sum over the inputs of an output

The sum is exact in 32 bits. A convolution pads with c = Z, which stands for 0. Codes of more than 8 bits are two bytes,
and the layer is the sum of two (see `WideIntegerLayer`). Where D and Z are taken from the input, see `dynamic_layer`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.engine.codes_layer import CodesLayer
from qdiff.engine.dynamic_layer import DynamicLayer
from qdiff.engine.quant_params import DynamicParams, QuantParams
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quantizers import DynamicQuantizer, FrozenQuantizer, Quantizer, UniformAffineQuantizer


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


def is_pointwise(spec: LayerSpec) -> bool:
    """Return whether this is a Conv2d that computes each pixel from itself alone."""
    if spec.options is None or spec.weight.ndim != 4:
        return False
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return spec.weight.shape[2:] == (1, 1) and all(spec.options[name] == value for name, value in plain.items())


class IntegerLayer(CodesLayer):
    """A layer that a backend made from a LayerSpec."""

    params: QuantParams


MakeLayer = Callable[[LayerSpec], IntegerLayer]


class SplitIntegerLayer(nn.Module):
    """The sum of two layers: `first` on the first `split` channels of the input, `second` on the others."""

    first: CodesLayer
    second: CodesLayer

    def __init__(self, first: CodesLayer, second: CodesLayer, split: int):
        super().__init__()
        self.first, self.second, self.split = first, second, split

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, : self.split], x[:, self.split :]
        return self.second.plus(self.second.quantize(second), self.first(first))


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


def _part(layer: QuantModule, name: str, make: MakeLayer) -> CodesLayer:
    """Return the integer layer of one weight quantizer; a split layer has two."""
    quantizer, act = getattr(layer, name), getattr(layer, name.replace("weight", "act"))
    if not isinstance(act, UniformAffineQuantizer | DynamicQuantizer):
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
        params=params_of(act) if isinstance(act, UniformAffineQuantizer) else _params_of_products(act),
        options=layer.options or None,
    )
    return _dynamic(spec, act, quantizer, make) if isinstance(act, DynamicQuantizer) else _static(spec, quantizer, make)


def _params_of_products(quantizer: DynamicQuantizer) -> QuantParams:
    """Return the numbers with which a backend's layer computes products of the codes themselves."""
    return QuantParams(delta=1.0, zero_point=0, high=2**quantizer.n_bits - 1)


def _dynamic(spec: LayerSpec, act: DynamicQuantizer, quantizer: FrozenQuantizer, make: MakeLayer) -> DynamicLayer:
    """Return the layer of an input with dynamic ranges. spec: its params are `_params_of_products`."""
    sums = spec.weight.flatten(1).sum(1, dtype=torch.float64).mul_(spec.step).float()
    padding, options = (), spec.options
    if options is not None:
        padding = tuple(options["padding"]) if act.per == "sample" else ()
        options = options | {"padding": tuple(0 for _ in padding)}
    layer = _static(replace(spec, bias=None, options=options), quantizer, make)
    params = DynamicParams(high=spec.params.high, symmetric=act.symmetric, per=act.per, padding=padding)
    return DynamicLayer(layer, sums, spec.bias, params, pointwise=is_pointwise(spec))


def _static(spec: LayerSpec, quantizer: FrozenQuantizer, make: MakeLayer) -> CodesLayer:
    """Return the layer of an input whose range is that of spec.params."""
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
