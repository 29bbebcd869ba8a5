"""Convolutions of a decoder: in floats, or on integer codes. They convolve a stripe of rows at a time.

A stripe's output is small enough to stay in the CPU's cache until it is added to, or stored into, a feature map.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import fused_ops
from qdiff.engine.layers import LayerSpec, MakeLayer
from qdiff.engine.quant_params import QuantParams

LEAST_WEIGHT = 1e-12  # that the largest weight of an output counts as, where all are 0
LARGEST_WEIGHT = 127  # of the codes of weights, which are -127..127
STRIPE = 8192  # pixels that a stripe has


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The numbers of a convolution with stride 1, whose rows are padded by the caller and whose columns by `padding`.

    name: where it stands in the autoencoder. weight: float32 [outputs, inputs, height, width]. bias: float32 [outputs].
    """

    name: str
    weight: Tensor
    bias: Tensor
    padding: int

    @classmethod
    def of(cls, name: str, conv: nn.Conv2d) -> "Kernel":
        """Return the numbers of a convolution that keeps the size of its input."""
        assert conv.bias is not None
        bias = conv.bias.detach().float().clone()
        return cls(name=name, weight=conv.weight.detach().float().clone(), bias=bias, padding=conv.weight.shape[3] // 2)

    @classmethod
    def joined(cls, kernels: "Sequence[Kernel]") -> "Kernel":
        """Return one convolution with the outputs of several, which have one name and one input."""
        weight, bias = (torch.cat([getattr(kernel, name) for kernel in kernels]) for name in ("weight", "bias"))
        return replace(kernels[0], weight=weight, bias=bias)


class Convolution(ABC):
    """A convolution of operands, which are made of features [1, C, H, W] in channels_last order.

    height: of the kernel. outputs: the number of channels. dtype: of its features. fill: the operand that stands for 0.
    """

    fill: float = 0.0

    def __init__(self, kernel: Kernel, dtype: torch.dtype):
        self.outputs, self.height, self.dtype = len(kernel.weight), kernel.weight.shape[2], dtype

    @abstractmethod
    def operand(self, x: Tensor) -> Tensor:
        """Return the operand of features x, of any float dtype."""

    @abstractmethod
    def normed(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        """Return the operand of norm(x), or of SiLU of it."""

    @abstractmethod
    def __call__(self, operand: Tensor) -> Tensor:
        """Return the features [1, outputs, H - height + 1, W] of an operand [1, C, H, W]."""


MakeConvolution = Callable[[Kernel], Convolution]


class FloatConvolution(Convolution):
    """A convolution in bfloat16 or float32. Its operands are features."""

    def __init__(self, kernel: Kernel, dtype: torch.dtype):
        super().__init__(kernel, dtype)
        self.weight = kernel.weight.to(dtype, memory_format=torch.channels_last)
        self.bias, self.padding = kernel.bias.to(dtype), kernel.padding

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def normed(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        # The statistics are sums of float32, whatever x is. Only the CPU takes other dtypes for weights than for x.
        kind = torch.float32 if x.device.type == "cpu" else x.dtype
        y = F.group_norm(x, norm.num_groups, norm.weight.to(kind), norm.bias.to(kind), norm.eps)
        return F.silu(y, inplace=True) if silu else y

    def __call__(self, operand: Tensor) -> Tensor:
        return F.conv2d(operand, self.weight, self.bias, padding=(0, self.padding))


class IntegerConvolution(Convolution):
    """A convolution of codes: weights of 8 bits with a step for each output channel, symmetric around 0.

    params: the quantizer of its input. make: the backend. dtype: of the features that come out.
    """

    def __init__(self, kernel: Kernel, dtype: torch.dtype, params: QuantParams, make: MakeLayer):
        super().__init__(kernel, dtype)
        self.fill = params.zero_point
        codes, step = weight_codes(kernel.weight)
        options = {"stride": (1, 1), "padding": (0, kernel.padding), "dilation": (1, 1), "groups": 1}
        self.layer = make(LayerSpec(weight=codes, step=step, bias=kernel.bias, params=params, options=options))

    def operand(self, x: Tensor) -> Tensor:
        return self.layer.quantize(x)

    def normed(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        return fused_ops.group_norm(norm, x, self.layer.params, silu=silu)

    def __call__(self, operand: Tensor) -> Tensor:
        return self.layer.to_float(operand, self.dtype)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes -127..127 of a convolution's weight, int8, and the step of each output channel, float32."""
    step = weight.flatten(1).abs().amax(1).clamp_min(LEAST_WEIGHT) / LARGEST_WEIGHT
    return (weight / step.view(-1, 1, 1, 1)).round_().to(torch.int8), step


class UpsamplingConvolution:
    """Doubling by nearest neighbour and then a 3x3 convolution, without the doubled map.

    The output pixels (2 y + i, 2 x + j) see 2 x 2 different input pixels only, so that they are a 2x2 convolution whose
    weights are sums of the 3x3 ones. The four phases (i, j) take 16 products where the doubled map takes 36.
    """

    ROWS = (((0,), (1, 2)), ((0, 1), (2,)))  # of the 3x3 kernel: which are summed, by phase and row of the 2x2 kernel

    def __init__(self, kernel: Kernel, make: MakeConvolution):
        phases = [(i, j) for i in range(2) for j in range(2)]
        self.phases = {(i, j): make(self._phase(kernel, i, j)) for i, j in phases}
        self.first = self.phases[0, 0]

    def _phase(self, kernel: Kernel, i: int, j: int) -> Kernel:
        rows = torch.stack([kernel.weight[:, :, list(three)].sum(2) for three in self.ROWS[i]], dim=2)
        both = torch.stack([rows[..., list(three)].sum(3) for three in self.ROWS[j]], dim=3)
        return Kernel(name=kernel.name, weight=both, bias=kernel.bias, padding=0)

    def __call__(self, x: Tensor, start: int, stop: int, out: Tensor) -> None:
        """Write the rows 2 start .. 2 stop of the output to `out` [1, outputs, 2 (stop - start), 2 W]; x: features."""
        operand = padded(self.first.operand(_with_halo(x, start, stop, 1)), x.shape[2], start, stop, 1, self.first.fill)
        operand = F.pad(operand, (1, 1), value=self.first.fill)
        rows, columns = stop - start + 1, x.shape[3] + 1
        for (i, j), phase in self.phases.items():
            out[:, :, i::2, j::2] = phase(operand[:, :, i : i + rows, j : j + columns])


# --- stripes -----------------------------------------------------------------------------------------------


def stripes(height: int, width: int, pixels: int = STRIPE) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of each stripe, of `pixels` at most, of a feature map."""
    rows = max(1, pixels // width)
    yield from ((start, min(start + rows, height)) for start in range(0, height, rows))


def _with_halo(x: Tensor, start: int, stop: int, halo: int) -> Tensor:
    """Return the rows of x from `start` to `stop`, and `halo` more on both sides where x has them."""
    return x[:, :, max(0, start - halo) : stop + halo]


def padded(operand: Tensor, height: int, start: int, stop: int, halo: int, fill: float) -> Tensor:
    """Fill up the rows that `_with_halo` could not take from a map of this height."""
    above, below = max(0, halo - start), max(0, stop + halo - height)
    return F.pad(operand, (0, 0, above, below), value=fill) if above or below else operand


def convolved_stripes(
    conv: Convolution, x: Tensor, prepare: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the stripes of conv(x): first row, end, features. x: its operand, or what `prepare` makes an operand of."""
    height, halo = x.shape[2], conv.height // 2
    for start, stop in stripes(*x.shape[2:]):
        part = _with_halo(x, start, stop, halo)
        part = part if prepare is None else prepare(part)
        yield start, stop, conv(padded(part, height, start, stop, halo, conv.fill))


def new_map(conv: Convolution, height: int, width: int, device: torch.device) -> Tensor:
    """Return an empty feature map for the outputs of a convolution."""
    size = (1, conv.outputs, height, width)
    return torch.empty(size, dtype=conv.dtype, device=device, memory_format=torch.channels_last)


def convolve(conv: Convolution, x: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return conv(x), see `convolved_stripes`."""
    out = new_map(conv, x.shape[2], x.shape[3], x.device)
    for start, stop, part in convolved_stripes(conv, x, prepare):
        out[:, :, start:stop] = part
    return out


def upsample(conv: UpsamplingConvolution, x: Tensor) -> Tensor:
    """Return the features [1, outputs, 2 H, 2 W] of features x [1, C, H, W]."""
    out = new_map(conv.first, 2 * x.shape[2], 2 * x.shape[3], x.device)
    for start, stop in stripes(*x.shape[2:]):
        conv(x, start, stop, out[:, :, 2 * start : 2 * stop])
    return out
