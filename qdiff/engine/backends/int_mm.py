"""Integer layers by `torch._int_mm`, the product of int8 matrices, on GPUs. Tests also run it on CPUs.

A convolution becomes the product of the patches of its input. Matrices are padded with zeros to the sizes that the
product takes.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import IntegerLayer, LayerSpec
from qdiff.engine.quant_params import signed

MULTIPLE = 8  # the inputs and the outputs of a product must be multiples of this
ROWS = 32  # the least number of rows of a product


class IntMatmulLayer(IntegerLayer):
    """An integer layer computed as a product of int8 matrices.

    Codes c are multiplied as c - 128. Then `shift`, which is (128 - Z) times the sum of an output's weights, is added.
    """

    weight: Tensor
    step: Tensor
    shift: Tensor
    bias: Tensor | None

    def __init__(self, spec: LayerSpec):
        super().__init__(spec.params)
        self.options, self.kernel = spec.options, tuple(spec.weight.shape[2:])
        rows = spec.weight.flatten(1)
        self.outputs = len(rows)
        padding = (0, -rows.shape[1] % MULTIPLE, 0, -len(rows) % MULTIPLE)
        self.register_buffer("weight", F.pad(rows, padding))
        self.register_buffer("step", spec.step * spec.params.delta)
        self.register_buffer("shift", (128 - spec.params.zero_point) * rows.sum(1, dtype=torch.int32))
        self.register_buffer("bias", spec.bias)

    def to_float(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        rows, shape = self._rows(signed(codes))
        padding = (0, self.weight.shape[1] - rows.shape[1], 0, max(0, ROWS - len(rows)) or -len(rows) % MULTIPLE)
        sums = torch.ops.aten._int_mm(F.pad(rows, padding), self.weight.t())[: len(rows), : self.outputs]
        outputs = (sums + self.shift).float() * self.step
        outputs = outputs if self.bias is None else outputs + self.bias
        outputs = outputs.to(dtype).view(*shape, self.outputs)
        return outputs if self.options is None else outputs.movedim(-1, 1)  # in channels_last order

    def _rows(self, codes: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the rows of the product, [rows, inputs] of signed codes, and the output's shape without channels."""
        if self.options is None:
            return codes.flatten(0, -2), codes.shape[:-1]
        padding, stride, dilation = (self.options[name] for name in ("padding", "stride", "dilation"))
        around = [side for n in reversed(padding) for side in (n, n)]
        codes = F.pad(codes, around, value=self.params.zero_point - 128) if any(padding) else codes
        sizes = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(codes.shape[2:], dilation, self.kernel, stride, strict=True)
        ]
        patches = [self._at(codes, place, sizes) for place in product(*map(range, self.kernel))]
        rows = torch.stack(patches, dim=-1).movedim(1, -2)  # [B, *sizes, C, places of the kernel]
        return rows.reshape(-1, codes.shape[1] * len(patches)), (len(codes), *sizes)

    def _at(self, codes: Tensor, place: tuple[int, ...], sizes: list[int]) -> Tensor:
        """Return the codes [B, C, *sizes] that the kernel's entry at `place` is multiplied with."""
        assert self.options is not None
        for dim, (k, size) in enumerate(zip(place, sizes, strict=True), start=2):
            stride = self.options["stride"][dim - 2]
            start = k * self.options["dilation"][dim - 2]
            codes = codes[(slice(None),) * dim + (slice(start, start + (size - 1) * stride + 1, stride),)]
        return codes


def int_matmul_layer(spec: LayerSpec) -> IntegerLayer:
    """Return an IntMatmulLayer; a SimulatedLayer for groups, and for zero points outside of the bytes."""
    if (spec.options and spec.options["groups"] > 1) or not 0 <= spec.params.zero_point <= 255:
        return SimulatedLayer(spec)
    return IntMatmulLayer(spec)
