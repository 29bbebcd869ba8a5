"""Integer layers by oneDNN, on CPUs: unsigned activations, signed weights, sums of 32 bits, steps and bias fused.

Without VNNI instructions, sums of two products saturate at 16 bits: there weights are exact up to 64 only, see
`largest_exact_weight`. Instruction sets also differ in how they multiply a sum by the two steps, see `step_order`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.layers import IntegerLayer, LayerSpec, is_pointwise
from qdiff.engine.quant_params import QuantParams

OUTPUTS = (torch.float32, torch.bfloat16)  # the float dtypes that the kernels write
LARGEST = 128  # the largest absolute weight of a byte
LARGEST_IN_16_BITS = 64  # 2 * 255 * 64 is below 2^15
MANY = 14_000_000  # weights of a convolution that takes patches: in Stable Diffusion v1 those of maps up to 32x32
STRIPE = 2**24  # bytes of patches that are made at a time

StepOrder = Literal["one by one", "together"]


class OneDNNLayer(IntegerLayer):
    """An integer layer whose weight is laid out for oneDNN's kernels.

    A Conv1d runs as a Conv2d of height 1. A 1x1 convolution runs as a linear layer on the channels of each pixel, which
    takes half of the time on small feature maps. A convolution with many weights runs as a linear layer on the patches
    of its input: that is as fast on the small maps that it has, and its weights are laid out in two thirds of the time.

    `packed` is oneDNN's word for that layout; here each weight takes a byte.
    """

    packed: Tensor
    step: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, spec: LayerSpec):
        super().__init__(spec.params)
        self.register_buffer("step", spec.step)
        self.register_buffer("zeros", torch.zeros(len(spec.step), dtype=torch.int32))
        self.register_buffer("bias", spec.bias)
        self.one_dimensional = spec.weight.ndim == 3
        self.geometry: list[Any] | None = None  # a convolution's stride, padding, dilation and groups
        self.pointwise = is_pointwise(spec)
        self.patch: tuple[int, ...] | None = None  # the height and width of a patch, where the layer takes patches
        if spec.options is not None and _takes_patches(spec):
            self.patch, self.padding = tuple(spec.weight.shape[2:]), tuple(spec.options["padding"])
        if spec.options is None or self.pointwise or self.patch is not None:
            rows = spec.weight if self.patch is None else spec.weight.permute(0, 2, 3, 1)
            packed = torch.ops.onednn.qlinear_prepack(rows.flatten(1).contiguous(), None)
        else:
            names = ("stride", "padding", "dilation")
            sizes = [_pair(spec.options[name], self.one_dimensional, name) for name in names]
            self.geometry = [*sizes, spec.options["groups"]]
            weight = spec.weight.unsqueeze(2) if self.one_dimensional else spec.weight
            packed = torch.ops.onednn.qconv_prepack(
                weight, spec.step, spec.params.delta, spec.params.zero_point, *self.geometry, None
            )
        self.packed = packed  # not a buffer: only the kernels know its layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneDNNLayer":
        super()._apply(fn, recurse)
        if self.step.device.type != "cpu":
            raise NotImplementedError("a model lowered for the CPU cannot be moved: load it on the other device")
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        raise NotImplementedError("a lowered model cannot be saved: its cali_ckpt holds it")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise NotImplementedError("weights cannot be loaded into a lowered model: load, then lower")

    def __deepcopy__(self, memo: dict) -> "OneDNNLayer":
        raise NotImplementedError("a lowered model cannot be copied: load it anew")

    def to_float(self, codes: Tensor, dtype: torch.dtype, params: QuantParams | None = None) -> Tensor:
        """Return the layer's output. params: of these codes, if they are not the layer's; of 8 bits."""
        params = params or self.params
        out = dtype if dtype in OUTPUTS else torch.float32
        if self.pointwise:
            pixels = codes.permute(0, 2, 3, 1).contiguous()  # no copy of a channels_last tensor
            return self._linear(pixels, params, out, 1.0, 0).to(dtype).permute(0, 3, 1, 2)
        if self.patch is not None:
            return self._of_patches(codes, self.patch, params, out).to(dtype)
        if self.geometry is None:
            return self._linear(codes, params, out, 1.0, 0).to(dtype)
        codes = codes.unsqueeze(2) if self.one_dimensional else codes
        codes = codes.contiguous(memory_format=torch.channels_last)
        arguments = (*self._numbers(params), *self.geometry, 1.0, 0, out, "none", [], "")
        result = torch.ops.onednn.qconv_pointwise(codes, *arguments).to(dtype)
        return result.squeeze(2).contiguous() if self.one_dimensional else result

    def to_codes(self, codes: Tensor, params: QuantParams) -> Tensor:
        saturates = params.high == 255 and 0 <= params.zero_point <= 255  # at the ends of a byte, as the kernel does
        if self.geometry is not None or self.pointwise or self.patch is not None or not saturates:
            return super().to_codes(codes, params)
        return self._linear(codes, self.params, torch.uint8, params.delta, params.zero_point)

    def _of_patches(self, codes: Tensor, patch: tuple[int, ...], params: QuantParams, out: torch.dtype) -> Tensor:
        """Return the output of a convolution, by a linear layer on its patches, a stripe of rows at a time."""
        high, wide = self.padding
        pixels = F.pad(codes.permute(0, 2, 3, 1), (0, 0, wide, wide, high, high), value=params.zero_point)
        rows = pixels.shape[1] - patch[0] + 1
        stripe = max(1, STRIPE // (pixels[:, 0].numel() * math.prod(patch)))
        parts = []
        for start in range(0, rows, stripe):
            around = pixels[:, start : min(start + stripe, rows) + patch[0] - 1]
            patches = around.unfold(1, patch[0], 1).unfold(2, patch[1], 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
            parts.append(self._linear(patches, params, out, 1.0, 0))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).permute(0, 3, 1, 2)

    def _linear(self, codes: Tensor, params: QuantParams, out: torch.dtype, delta: float, zero_point: int) -> Tensor:
        numbers = self._numbers(params)
        return torch.ops.onednn.qlinear_pointwise(codes, *numbers, delta, zero_point, out, "none", [], "")

    def _numbers(self, params: QuantParams) -> tuple[Any, ...]:
        return params.delta, params.zero_point, self.packed, self.step, self.zeros, self.bias


def _takes_patches(spec: LayerSpec) -> bool:
    """Return whether this is a Conv2d of many weights, with a stride of 1, that pads by a code of a byte."""
    plain = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    return (
        spec.weight.ndim == 4
        and spec.weight.numel() >= MANY
        and 0 <= spec.params.zero_point <= 255
        and spec.options is not None
        and all(spec.options[name] == value for name, value in plain.items())
        and not is_pointwise(spec)
    )


def _pair(value: tuple[int, ...], one_dimensional: bool, name: str) -> list[int]:
    return [0 if name == "padding" else 1, *value] if one_dimensional else list(value)


# --- what the kernels do on this CPU -----------------------------------------------------------------------


@functools.cache
def largest_exact_weight() -> int:
    """Return the largest |q - z| for which this CPU's sums are exact: 128, 64 without VNNI, 0 without kernels."""
    for largest in (LARGEST, LARGEST_IN_16_BITS):
        for weight in (-largest, largest - 1):
            layer = _probe(torch.full((16, 64), weight, dtype=torch.int8))
            result = None if layer is None else layer.to_float(torch.full((4, 64), 255).byte(), torch.float32)
            if result is None or not bool((result == 255 * weight * 64).all()):
                break
        else:
            return largest
    return 0


@functools.cache
def step_order(dtype: torch.dtype) -> StepOrder | None:
    """Return how oneDNN multiplies a sum by the steps D of the input and d of the weight, with an output in `dtype`.

    "one by one": (sum * D) * d + bias. "together": sum * (D * d) + bias. None if it is neither, or without kernels;
    then layers agree with the simulation within 2e-7 of their largest output. It is found by trying, as it depends on
    oneDNN's version and on what oneDNN knows of the CPU. With PyTorch 2.14 it is

        AVX2_VNNI, AVX512_CORE, AVX512_CORE_VNNI, AVX512_CORE_BF16      one by one
        AVX2                        together in float32, one by one in bfloat16
        AVX512_CORE_AMX                                                 together

    Convolutions of several groups may have another order: with AVX2_VNNI they do.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 8, (512, 64), generator=generator, dtype=torch.int8)
    codes = torch.randint(0, 256, (154, 64), generator=generator, dtype=torch.uint8)
    step, bias = torch.rand(2, 512, generator=generator)
    layer = _probe(weight, step, bias)
    if layer is None:
        return None
    sums, delta = codes.float() @ weight.float().T, torch.tensor(layer.params.delta)
    result = layer.to_float(codes, dtype)
    if torch.equal(result, (sums * delta * step + bias).to(dtype)):
        return "one by one"
    return "together" if torch.equal(result, (sums * (delta * step) + bias).to(dtype)) else None


def _probe(weight: Tensor, step: Tensor | None = None, bias: Tensor | None = None) -> OneDNNLayer | None:
    """Return a linear layer to try; None if PyTorch was built without these kernels, or they do not run here."""
    plain = step is None
    params = QuantParams(delta=1.0 if plain else 0.0137, zero_point=0, high=255)
    spec = LayerSpec(weight=weight, step=torch.ones(len(weight)) if plain else step, bias=bias, params=params)
    try:
        layer = OneDNNLayer(spec)
        layer.to_float(torch.zeros(1, weight.shape[1], dtype=torch.uint8), torch.float32)
    except (RuntimeError, AttributeError):
        return None
    return layer
