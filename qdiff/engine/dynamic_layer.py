"""Integer layers whose inputs have ranges of their own: one a token, or one a sample.

With the names of `layers`, a token's or a sample's step D and zero point Z leave the sum:

    y = D (d sum c (q - z) - Z d sum (q - z)) + bias

A backend's layer computes the first sum for all tokens and samples, as one with step 1 and zero point 0. The second is
a number of each output.
"""

import math

import torch
from torch import Tensor, nn

from qdiff.engine import dynamic_ops
from qdiff.engine.codes_layer import CodesLayer
from qdiff.engine.features import has_kernel
from qdiff.engine.quant_params import Codes, DynamicCodes, DynamicParams, Params, QuantParams

PRODUCTS = 2**22  # how many are in memory at a time, about, where tokens are many: 16 MiB


class DynamicLayer(CodesLayer):
    """A layer that computes from codes with dynamic ranges.

    layer: has no bias, step 1 and zero point 0, and does not pad: the codes are padded. sums: d sum (q - z), float32
    [outputs]. bias: float32 [outputs]; None for zeros. pointwise: it is a convolution that computes each pixel of a map
    from itself alone.
    """

    params: DynamicParams
    sums: Tensor
    bias: Tensor

    def __init__(
        self, layer: CodesLayer, sums: Tensor, bias: Tensor | None, params: DynamicParams, *, pointwise: bool = False
    ):
        super().__init__(params)
        self.layer, self.pointwise = layer, pointwise
        self.register_buffer("sums", sums)
        self.register_buffer("bias", torch.zeros_like(sums) if bias is None else bias)

    def to_float(self, codes: DynamicCodes, dtype: torch.dtype) -> Tensor:
        return self._to_float(codes, dtype)

    def plus(self, codes: DynamicCodes, addend: Tensor, *, out: Tensor | None = None) -> Tensor:
        return self._to_float(codes, addend.dtype, plus=addend, out=out)

    def _to_float(
        self, codes: DynamicCodes, dtype: torch.dtype, *, plus: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        pieces = self._pieces(codes)
        if len(pieces) == 1:
            return dynamic_ops.rescale(self._products(codes), codes, self.sums, self.bias, dtype, plus=plus, out=out)
        out = self._empty(codes, dtype) if out is None else out
        addends = [None] * len(pieces) if plus is None else _rows_of(plus).split([piece.rows for piece in pieces])
        targets = _rows_of(out).split([piece.rows for piece in pieces])
        for piece, addend, target in zip(pieces, addends, targets, strict=True):
            products = self._products(piece)
            dynamic_ops.rescale(products, piece, self.sums, self.bias, dtype, plus=addend, out=target)
        return out

    def to_codes(self, codes: DynamicCodes, params: QuantParams) -> Tensor:
        pieces = self._pieces(codes) if self.params.per == "token" else [codes]
        if len(pieces) == 1:
            return dynamic_ops.rescale_to_codes(self._products(codes), codes, self.sums, self.bias, params)
        out = self._empty(codes, torch.uint8)
        for piece, target in zip(pieces, _rows_of(out).split([piece.rows for piece in pieces]), strict=True):
            dynamic_ops.rescale_to_codes(self._products(piece), piece, self.sums, self.bias, params, out=target)
        return out

    def geglu(self, codes: DynamicCodes, params: Params, dtype: torch.dtype) -> Codes:
        if not isinstance(params, DynamicParams) or not has_kernel(self.sums):
            return super().geglu(codes, params, dtype)
        return dynamic_ops.geglu_of_products(self._products(codes), codes, self.sums, self.bias, params)

    def group_norm(
        self,
        codes: DynamicCodes,
        norm: nn.GroupNorm,
        params: Params,
        dtype: torch.dtype,
        *,
        added: Tensor,
        silu: bool,
    ) -> Codes:
        if not isinstance(params, DynamicParams) or not has_kernel(self.sums, norm) or not codes.codes.numel():
            return super().group_norm(codes, norm, params, dtype, added=added, silu=silu)
        products = self._products(codes)
        steps, zero_points = codes.ranges.unbind(1)
        more = added.float() + self.bias - (steps * zero_points)[:, None] * self.sums
        return dynamic_ops.group_norm(norm, products, params, added=more, silu=silu, gains=steps.contiguous())

    def _products(self, codes: DynamicCodes) -> Tensor:
        if self.pointwise and codes.params.per == "token":  # a piece of a feature map
            image = codes.codes.unsqueeze(-3).unsqueeze(-4).movedim(-1, -3)
            return _rows_of(self.layer.to_float(image, torch.float32))
        return self.layer.to_float(codes.codes, torch.float32)

    def _pieces(self, codes: DynamicCodes) -> list[DynamicCodes]:
        """Return the codes of tokens or pixels that are computed together; the whole where they are few.

        Feature maps are split where each pixel is computed from itself alone, and our kernels are there.
        """
        count = math.ceil(codes.rows * len(self.sums) / PRODUCTS)
        if count < 2 or not has_kernel(self.sums):
            return [codes]
        rows = math.ceil(codes.rows / count)
        if self.params.per == "token":
            return codes.split(rows)
        return codes.pixels(rows) if self.pointwise else [codes]

    def _empty(self, codes: DynamicCodes, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor for the outputs of tokens, or of a feature map's pixels."""
        if self.params.per == "token":
            return torch.empty(*codes.shape[:-1], len(self.sums), dtype=dtype)
        samples, _, *sizes = codes.shape
        return torch.empty(samples, *sizes, len(self.sums), dtype=dtype).movedim(-1, 1)


def _rows_of(x: Tensor) -> Tensor:
    """Return tokens, or a feature map in channels_last order, as rows: no copy of what is in this order."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)
