"""Integer layers by our Triton kernels, on NVIDIA GPUs: int8 products and implicit convolutions, all else fused."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.triton_kernels import CODES, FLOAT, NUMBERS, PLUS, add_parts, gated_product, product
from qdiff.engine.features import on_device
from qdiff.engine.layers import IntegerLayer, LayerSpec
from qdiff.engine.quant_params import Codes, Params, QuantParams, signed

PROCESSORS = 132  # of an H100; tiles are chosen so that about as many programs run
PROGRAMS = 320  # that a convolution is divided among, of 4 warps: a processor of an H100 runs two or three at a time
LEAST_BLOCKS = 6  # of inputs that one of several programs sums up
MOST_PARTS = 8  # of the sums of a tile


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is divided: tiles of rows x outputs, each summed up by `split` programs, `inputs` at a time."""

    rows: int
    outputs: int
    inputs: int
    split: int = 1
    warps: int = 4
    stages: int = 4


def tiling(rows: int, outputs: int, channels: int, places: int) -> Tiling:
    """Return the tiling of a product [rows, outputs] over `places` times so many channels."""
    inputs = 128 if channels % 128 == 0 else 64 if channels > 32 else 32
    if outputs <= 32:
        return Tiling(rows=64, outputs=16 if outputs <= 16 else 32, inputs=inputs)
    if places > 1:
        return _tiling_of_maps(rows, outputs, channels, places)
    narrow = 0 < outputs % 128 <= 64
    for high, wide, warps in ((128, 128, 8), (128, 64, 4), (64, 64, 4)):
        tiles = math.ceil(rows / high) * math.ceil(outputs / wide)
        if tiles >= 0.9 * PROCESSORS and not (wide == 128 and narrow):
            return Tiling(rows=high, outputs=wide, inputs=inputs, warps=warps)
    tiles = math.ceil(rows / 64) * math.ceil(outputs / 64)
    blocks = places * math.ceil(channels / inputs)
    split = max(1, min(PROCESSORS * 3 // 2 // tiles, blocks // LEAST_BLOCKS, MOST_PARTS))
    return Tiling(rows=64, outputs=64, inputs=inputs, split=split)


def _tiling_of_maps(rows: int, outputs: int, channels: int, places: int) -> Tiling:
    """Return the tiling of a convolution: what was fastest for those of Stable Diffusion v1 on an H100, or near it."""
    inputs = 64 if channels > 32 else 32  # longer ones were slower
    if math.ceil(rows / 128) * math.ceil(outputs / 64) >= 0.9 * PROGRAMS:
        return Tiling(rows=128, outputs=64, inputs=inputs)
    wide = 128 if outputs > 64 else 64
    tiles, blocks = math.ceil(rows / 64) * math.ceil(outputs / wide), places * math.ceil(channels / inputs)
    split = max(1, min(round(PROGRAMS / tiles), blocks // LEAST_BLOCKS, MOST_PARTS))
    return Tiling(rows=64, outputs=wide, inputs=inputs, split=split)


class TritonLayer(IntegerLayer):
    """A linear layer or a convolution of one group and no dilation.

    Signed codes c - 128 are multiplied, and `shift`, which is (128 - Z) times the sum of an output's weights, is added.
    Where a convolution's kernel stands out of the map, less weights count: `shift` has a row for each way in which it
    can, see `_shifts`.
    """

    weight: Tensor
    step: Tensor
    shift: Tensor
    bias: Tensor

    def __init__(self, spec: LayerSpec):
        super().__init__(spec.params)
        self.is_map = spec.options is not None
        weight, options = spec.weight, spec.options or {}
        self.kernel, self.stride = tuple(weight.shape[2:]) or (1, 1), options.get("stride", (1, 1))
        self.padding = options.get("padding", (0, 0))
        self.one_dimensional = weight.ndim == 3
        if self.one_dimensional:  # a convolution of maps of height 1
            self.kernel, self.stride, self.padding = (1, *self.kernel), (1, *self.stride), (0, *self.padding)
            weight = weight.unsqueeze(2)
        self.outputs, self.channels = weight.shape[:2]
        places = weight.movedim(1, -1) if self.is_map else weight
        self.register_buffer("weight", places.reshape(self.outputs, -1).contiguous())
        self.register_buffer("step", spec.step * spec.params.delta)
        self.register_buffer("shift", self._shifts(places) * (128 - spec.params.zero_point))
        self.register_buffer("bias", torch.zeros_like(spec.step) if spec.bias is None else spec.bias)

    def _shifts(self, places: Tensor) -> Tensor:
        """Return sums of weights, int32 [ways, outputs]; ways are numbered as by `_kind_of_border` of the kernels.

        places: [outputs, kh, kw, channels], or [outputs, channels] of a linear layer.
        """
        sums = places.sum(-1, dtype=torch.int32)
        if not self.is_map:
            return sums.view(1, -1)
        (kh, kw), (py, px) = self.kernel, self.padding
        ways = [
            sums[:, min(top, kh) : max(kh - bottom, 0), min(left, kw) : max(kw - right, 0)].sum(
                (1, 2), dtype=torch.int32
            )
            for top in range(py + 1)
            for bottom in range(py + 1)
            for left in range(px + 1)
            for right in range(px + 1)
        ]
        return torch.stack(ways)

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        wide = dtype in (torch.float32, torch.float16, torch.bfloat16)
        return self._compute(codes, FLOAT, dtype if wide else torch.float32).to(dtype)

    def plus(self, codes: Tensor, addend: Tensor, *, out: Tensor | None = None) -> Tensor:
        if addend.dtype == torch.float64 or self.one_dimensional or (self.is_map and out is not None):
            return super().plus(codes, addend, out=out)
        return self._compute(codes, PLUS, addend.dtype, addend=addend, out=out)

    def to_codes(self, codes: Tensor, params: QuantParams) -> Tensor:
        """Return the codes of the layer's output, signed: int8. See CodesLayer."""
        return super().to_codes(codes, params) if params.is_wide else self._compute(codes, CODES, torch.int8, to=params)

    def to_numbers(self, codes: Tensor, params: QuantParams, unit: float, dtype: torch.dtype) -> Tensor:
        if params.is_wide or dtype == torch.float64:
            return super().to_numbers(codes, params, unit, dtype)
        return self._compute(codes, NUMBERS, dtype, to=params, unit=unit)

    def geglu(self, codes: Tensor, params: Params, dtype: torch.dtype) -> Codes:
        half = dtype in (torch.float16, torch.bfloat16)
        if not isinstance(params, QuantParams) or params.is_wide or self.is_map or not half:
            return super().geglu(codes, params, dtype)
        codes, width = signed(codes).contiguous(), self.outputs // 2
        rows = codes.numel() // self.channels
        out = codes.new_empty(*codes.shape[:-1], width)
        if rows:
            inputs = 128 if self.channels % 128 == 0 else 64
            high, wide = (128, 64) if math.ceil(rows / 128) * math.ceil(width / 64) >= 0.9 * PROCESSORS else (64, 32)
            with on_device(codes):
                gated_product[(math.ceil(rows / high) * math.ceil(width / wide),)](
                    codes, self.weight, self.shift, self.step, self.bias, out, params.delta, float(params.zero_point),
                    float(params.high), rows, width, self.channels, self.channels, BF16=dtype == torch.bfloat16,
                    EVEN=self.channels % inputs == 0, BM=high, BN=wide, BK=inputs, num_warps=8 if high == 128 else 4,
                    num_stages=3,
                )  # fmt: skip
        return out

    def _compute(
        self,
        codes: Tensor,
        kind: int,
        dtype: torch.dtype,
        *,
        addend: Tensor | None = None,
        out: Tensor | None = None,
        to: QuantParams | None = None,
        unit: float = 1.0,
        tiles: Tiling | None = None,
    ) -> Tensor:
        """Return the output. kind: FLOAT, PLUS (with an addend), CODES (by `to`) or NUMBERS (in units of 1 / unit).
        tiles: None for those of `tiling`.

        A map's output is in channels_last order. out: where it goes, contiguous; for linear layers alone.
        """
        a, sizes, result = self._arrange(signed(codes))
        rows = math.prod(result)
        out = torch.empty(*result, self.outputs, dtype=dtype, device=a.device) if out is None else out
        if addend is not None:
            addend = (addend.movedim(1, -1) if self.is_map else addend).contiguous()
        if rows:
            with on_device(a):
                self._launch(a, rows, sizes, kind, out, out if addend is None else addend, to, unit, tiles)
        if not self.is_map:
            return out
        out = out.movedim(-1, 1)
        return out.squeeze(2).contiguous() if self.one_dimensional else out

    def _arrange(self, codes: Tensor) -> tuple[Tensor, tuple[int, int, int, int], tuple[int, ...]]:
        """Return the codes as the kernel reads them, (H, W, OH, OW) of a map, and the output's shape less its last."""
        if not self.is_map:
            return codes.contiguous(), (1, 1, 1, 1), tuple(codes.shape[:-1])
        codes = codes.unsqueeze(2) if self.one_dimensional else codes
        a = codes.permute(0, 2, 3, 1).contiguous()  # no copy of a channels_last map
        batch, height, width, _ = a.shape
        sizes = (height, width)
        high, wide = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(sizes, self.padding, self.kernel, self.stride, strict=True)
        )
        return a, (height, width, high, wide), (batch, high, wide)

    def _launch(
        self,
        a: Tensor,
        rows: int,
        sizes: tuple[int, int, int, int],
        kind: int,
        out: Tensor,
        addend: Tensor,
        to: QuantParams | None,
        unit: float,
        tiles: Tiling | None,
    ) -> None:
        places = math.prod(self.kernel)
        is_map = self.is_map and (places > 1 or self.stride != (1, 1) or self.padding != (0, 0))
        by = tiles or tiling(rows, self.outputs, self.channels, places)
        geometry = {
            "KH": self.kernel[0], "KW": self.kernel[1], "SY": self.stride[0], "SX": self.stride[1],
            "PY": self.padding[0], "PX": self.padding[1], "MAP": is_map, "KIND": kind,
        }  # fmt: skip
        codes = (1.0, 0.0, 0.0) if to is None else (1 / to.delta, float(to.zero_point), float(to.high))
        codes = (*codes, unit)
        numbers = (self.shift, self.step, self.bias, addend, out)
        parts = (
            out if by.split == 1 else torch.empty(by.split, rows, self.outputs, dtype=torch.int32, device=out.device)
        )
        grid = (math.ceil(rows / by.rows) * math.ceil(self.outputs / by.outputs), by.split)
        product[grid](
            a, self.weight, *numbers, parts, *codes, rows, self.outputs, self.channels, self.channels, *sizes,
            **geometry, EVEN=self.channels % by.inputs == 0, SPLIT=by.split, BM=by.rows, BN=by.outputs, BK=by.inputs,
            num_warps=by.warps, num_stages=by.stages,
        )  # fmt: skip
        if by.split > 1:
            high, wide = 16, 64
            add_parts[(math.ceil(rows / high) * math.ceil(self.outputs / wide),)](
                parts, *numbers, *codes, rows, self.outputs, *sizes, **geometry, SPLIT=by.split, BM=high, BN=wide,
                num_warps=4,
            )  # fmt: skip


def triton_layer(spec: LayerSpec) -> IntegerLayer:
    """Return a TritonLayer; for groups, dilations and zero points outside of the bytes, another backend's layer."""
    options = spec.options or {}
    plain = options.get("groups", 1) == 1 and all(step == 1 for step in options.get("dilation", ()))
    if not plain or spec.weight.ndim > 4 or not 0 <= spec.params.zero_point <= 255:
        return int_matmul_layer(spec)
    return TritonLayer(spec)
