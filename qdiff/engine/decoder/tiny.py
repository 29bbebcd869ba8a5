"""A tiny decoder on integer codes, whose ranges are taken from the picture while it is decoded: nothing is calibrated.

All layers but the first and the last compute with weights of 8 bits, with a step for each output channel, and codes of
8 bits, with one range for a map. A ReLU costs nothing: where codes begin at 0, quantizing cuts off what is below.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.tiny import TinyBlock, TinyDecoder
from qdiff.engine import fused_ops
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.decoder.layers import weight_codes
from qdiff.engine.layers import LayerSpec
from qdiff.engine.quant_params import QuantParams

HIGH = 255  # the largest code
LEAST_STEP = 1e-12  # of a map that is 0 everywhere


class IntegerTinyDecoder(nn.Module):
    """The same pictures as a TinyDecoder makes, up to rounding, on a CPU with oneDNN's integer kernels.

    It takes over the decoder's first and last convolution, which have few channels on one side and stay in floats.
    dtype: of the features between integer layers, bfloat16 or float32; the decoder must have it already.
    """

    def __init__(self, decoder: TinyDecoder, dtype: torch.dtype) -> None:
        super().__init__()
        first, relu, *middle, last = decoder.layers
        self.first, self.last = nn.Sequential(first, relu), last
        self.layers = nn.Sequential()
        for layer in middle:
            if isinstance(layer, TinyBlock):
                self.layers.append(IntegerTinyBlock(layer, dtype))
            elif isinstance(layer, nn.Conv2d):  # the one after each doubling
                self.layers.append(IntegerUpsampledConv(layer, dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return the pictures [1, 3, 8 h, 8 w], about [-1, 1] and not clamped, of scaled latents z [1, C, h, w].

        Ranges are those of all of z: decode one picture at a time, or it depends on its batch.
        """
        return TinyDecoder.pictures(self.last(self.layers(self.first(TinyDecoder.squeezed(z)))))


class IntegerTinyBlock(nn.Module):
    """relu(conv(relu(conv(relu(conv(x))))) + x), see TinyBlock."""

    def __init__(self, block: TinyBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList(DynamicConv(conv, dtype) for conv in block.conv if isinstance(conv, nn.Conv2d))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.convs
        h = first(*quantized(x))
        for conv in others:
            h = conv(*quantized(h, relu=True))
        return h.add_(x).relu_()


class IntegerUpsampledConv(nn.Module):
    """Doubling by nearest neighbour, of codes, and a convolution. Its input has gone through a ReLU."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = DynamicConv(conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        codes, params = quantized(x, relu=True)
        return self.conv(F.interpolate(codes, scale_factor=2.0), params)


class DynamicConv(nn.Module):
    """A 3x3 convolution of codes with parameters of their own, into features of `dtype`.

    A map has one range, so that the kernel takes its step; a DynamicLayer has one for each sample, and rescales sums.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        codes, step = weight_codes(conv.weight.detach().float())
        bias = None if conv.bias is None else conv.bias.detach().float()
        options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        params = QuantParams(delta=1.0, zero_point=0, high=HIGH)  # each call has others
        self.layer = OneDNNLayer(LayerSpec(weight=codes, step=step, bias=bias, params=params, options=options))

    def forward(self, codes: Tensor, params: QuantParams) -> Tensor:
        return self.layer.to_float(codes, self.dtype, params)


def quantized(x: Tensor, *, relu: bool = False) -> tuple[Tensor, QuantParams]:
    """Return the codes of a map, or of its ReLU, and their parameters. Raises ValueError for NaN and infinity."""
    pixels = x.permute(0, 2, 3, 1)  # in the order of memory; aminmax copies any other
    low, high = (0.0, float(pixels.amax())) if relu else (float(value) for value in pixels.aminmax())
    if not math.isfinite(high - low):
        raise ValueError("the tiny decoder made NaN or infinite features: use another one")
    low, high = min(low, 0.0), max(high, 0.0)
    delta = max((high - low) / HIGH, LEAST_STEP)
    params = QuantParams(delta=delta, zero_point=round(-low / delta), high=HIGH)
    return fused_ops.quantize(x, params)[0], params
