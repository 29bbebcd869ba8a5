"""Integer layers by oneDNN, on CPUs: unsigned activations, signed weights, sums of 32 bits, steps and bias fused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.engine.layers import IntegerLayer, LayerSpec, Range

OUTPUTS = (torch.float32, torch.bfloat16)  # what the kernels write


class OneDNNLayer(IntegerLayer):
    """The weight is laid out for the kernel once. A Conv1d is a Conv2d of height 1."""

    packed: Tensor
    step: Tensor
    zeros: Tensor

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.register_buffer("step", spec.step)
        self.register_buffer("zeros", torch.zeros(len(spec.step), dtype=torch.int32))
        self.register_buffer("bias", spec.bias)
        self.one_dimensional = spec.weight.ndim == 3
        if spec.options is None:
            self.options = None
            packed = torch.ops.onednn.qlinear_prepack(spec.weight.contiguous(), None)
        else:
            names = ("stride", "padding", "dilation")
            self.options = [_pair(spec.options[name], self.one_dimensional, name) for name in names]
            self.options.append(spec.options["groups"])
            weight = spec.weight.unsqueeze(2) if self.one_dimensional else spec.weight
            stride, padding, dilation, groups = self.options
            packed = torch.ops.onednn.qconv_prepack(
                weight, spec.step, spec.delta, spec.zero_point, stride, padding, dilation, groups, None
            )
        self.packed = packed  # of a layout of the kernel's own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneDNNLayer":
        super()._apply(fn, recurse)
        if self.step.device.type != "cpu":
            raise NotImplementedError("a model packed for the CPU cannot be moved: load it on the other device")
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        raise NotImplementedError("a packed model cannot be saved: its cali_ckpt holds it")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise NotImplementedError("weights cannot be loaded into a packed model: load, then pack")

    def __deepcopy__(self, memo: dict) -> "OneDNNLayer":
        raise NotImplementedError("a packed model cannot be copied: load it anew")

    def product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        out = dtype if dtype in OUTPUTS else torch.float32
        weight = (self.delta, self.zero_point, self.packed, self.step, self.zeros, self.bias)
        if self.options is None:
            return torch.ops.onednn.qlinear_pointwise(codes, *weight, 1.0, 0, out, "none", [], "").to(dtype)
        codes = codes.unsqueeze(2) if self.one_dimensional else codes
        codes = codes.contiguous(memory_format=torch.channels_last)
        result = torch.ops.onednn.qconv_pointwise(codes, *weight, *self.options, 1.0, 0, out, "none", [], "").to(dtype)
        return result.squeeze(2).contiguous() if self.one_dimensional else result

    def requantized(self, codes: Tensor, to: Range) -> Tensor:
        if self.options is not None or to.high != 255 or not 0 <= to.zero_point <= 255:  # the kernel saturates there
            return super().requantized(codes, to)
        weight = (self.delta, self.zero_point, self.packed, self.step, self.zeros, self.bias)
        to_codes = (to.delta, to.zero_point, torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(codes, *weight, *to_codes, "none", [], "")


def _pair(value: tuple[int, ...], one_dimensional: bool, name: str) -> list[int]:
    return [0 if name == "padding" else 1, *value] if one_dimensional else list(value)


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def works() -> bool:
    """Whether these kernels are there, and exact on this CPU: without VNNI instructions, sums of 16 bits saturate."""
    spec = LayerSpec(
        weight=torch.full((16, 64), 127, dtype=torch.int8),
        step=torch.ones(16),
        bias=None,
        delta=1.0,
        zero_point=0,
        high=255,
    )
    try:
        result = OneDNNLayer(spec).product(torch.full((4, 64), 255, dtype=torch.uint8), torch.float32)
    except (RuntimeError, AttributeError):  # not built in
        return False
    return bool((result == 255 * 127 * 64).all())
