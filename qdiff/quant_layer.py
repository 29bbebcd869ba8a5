"""Layers that quantize their input and their weight.

Names that Q-Diffusion's code has here are imported from `qdiff.quantizers` for those who know them by this path.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qdiff.config import QuantConfig
from qdiff.exchange import Exchanged
from qdiff.quantizers import DynamicQuantizer, Quantizer, UniformAffineQuantizer
from qdiff.quantizers import lp_loss as lp_loss
from qdiff.quantizers import round_ste as round_ste


class QuantModule(Exchanged):
    """A Conv2d, Conv1d or Linear that quantizes its input and its weight: op(act_quantizer(x), quantized weight, bias).

    It shares weight and bias with the layer whose slot it takes, under the same names. Ranges are not fitted yet:
    call `fit_weight`, calibrate the activations, or load a cali_ckpt.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, config: QuantConfig):
        super().__init__(layer)
        self.op, self.options = _operation(layer)
        if "bias" not in dict(self.named_parameters()):
            self.register_parameter("bias", None)
        self.weight_quantizer: Quantizer = weight_quantizer(config)
        self.act_quantizer: nn.Module = input_quantizer(config, layer)

    def weight_parts(self) -> dict[str, Tensor]:
        """Return the name of each weight quantizer, with the part of the weight that it quantizes."""
        return {"weight_quantizer": self.weight}

    def fit_weight(self) -> None:
        """Fit the ranges of the weight."""
        for name, part in self.weight_parts().items():
            getattr(self, name).fit(part)

    def quantized_weight(self) -> Tensor:
        """Return the weight after quantization, in its shape and dtype."""
        return self.weight_quantizer(self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return x after quantization, in its shape and dtype."""
        return self.act_quantizer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.quantized_input(x), self.quantized_weight(), self.bias, **self.options)

    def extra_repr(self) -> str:
        return f"{self.op.__name__}, {tuple(self.weight.shape)}"


class SplitQuantModule(QuantModule):
    """A layer on the concatenation [h, skip] of the decoder: each half has its own ranges, for input and weight.

    split: the channels of h, in 1..channels - 1; ValueError otherwise. The two halves come from different depths, so
    their values have different ranges.
    """

    def __init__(self, layer: nn.Module, config: QuantConfig, split: int):
        super().__init__(layer, config)
        if not 0 < split < self.weight.shape[1]:
            raise ValueError(f"split is {split}: it must lie within the {self.weight.shape[1]} input channels")
        self.split = split
        self.weight_quantizer_0: Quantizer = weight_quantizer(config)
        self.act_quantizer_0: nn.Module = input_quantizer(config, layer)

    def weight_parts(self) -> dict[str, Tensor]:
        first, second = self.weight[:, : self.split], self.weight[:, self.split :]
        return {"weight_quantizer": first, "weight_quantizer_0": second}

    def quantized_weight(self) -> Tensor:
        parts = self.weight_parts()
        return torch.cat([getattr(self, name)(part) for name, part in parts.items()], dim=1)

    def quantized_input(self, x: Tensor) -> Tensor:
        h, skip = x[:, : self.split], x[:, self.split :]
        return torch.cat([self.act_quantizer(h), self.act_quantizer_0(skip)], dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, split={self.split}"


def weight_quantizer(config: QuantConfig) -> UniformAffineQuantizer:
    """Return a new quantizer for a weight, with a range for each output channel."""
    return UniformAffineQuantizer(config.weight_bit, channel_wise=True, scale_method=config.scale_method)


def act_quantizer(config: QuantConfig) -> nn.Module:
    """Return a new quantizer with one range for an activation; the identity where activations stay float."""
    if not config.quant_act:
        return nn.Identity()
    return UniformAffineQuantizer(config.act_bit, config.act_symmetric, scale_method=config.act_scale_method)


def input_quantizer(config: QuantConfig, layer: nn.Module) -> nn.Module:
    """Return a new quantizer for a layer's input; the identity where activations stay float."""
    if not config.quant_act or config.act_range == "static":
        return act_quantizer(config)
    per = "token" if isinstance(layer, nn.Linear) else "sample"
    return DynamicQuantizer(config.act_bit, config.act_symmetric, per=per)


def softmax_quantizer(config: QuantConfig) -> nn.Module:
    """Return a new quantizer for a softmax output, unsigned with 0 exact; the identity where activations stay float."""
    if not config.quant_act:
        return nn.Identity()
    return UniformAffineQuantizer(config.sm_abit, scale_method=config.act_scale_method, always_zero=True)


def check_layer(layer: nn.Module) -> None:
    """Raise ValueError for a layer that cannot be quantized."""
    _operation(layer)


def _operation(layer: nn.Module) -> tuple[Callable[..., Tensor], dict]:
    """Return the function that a layer computes, and its keyword arguments."""
    if isinstance(layer, nn.Linear):
        return F.linear, {}
    functions = {nn.Conv2d: F.conv2d, nn.Conv1d: F.conv1d}
    for kind, function in functions.items():
        if isinstance(layer, kind) and layer.padding_mode == "zeros":
            names = ("stride", "padding", "dilation", "groups")
            return function, {name: getattr(layer, name) for name in names}
    raise ValueError(f"cannot quantize {layer}: Linear, Conv1d and Conv2d with zero padding are supported")
