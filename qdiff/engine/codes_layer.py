"""The interface of the engine's layers, which compute from codes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.engine import fused_ops
from qdiff.engine.quant_params import Codes, Params, QuantParams


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

    def __init__(self, params: Params):
        super().__init__()
        self.params = params

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, of any float dtype, and return the layer's output in that dtype."""
        return self.to_float(self.quantize(x), x.dtype)

    def quantize(self, x: Tensor) -> Any:
        """Return the codes of x; see `fused_ops.quantize`."""
        return fused_ops.quantize(x, self.params)[0]

    def to_float(self, codes: Any, dtype: torch.dtype) -> Tensor:
        """Return the layer's output in `dtype`. codes: of its input, as `quantize` returns them."""
        raise NotImplementedError

    def plus(self, codes: Any, addend: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the layer's output plus `addend`, in its dtype. out: where it goes, contiguous; it may be `addend`."""
        output = self.to_float(codes, addend.dtype)
        return output.add_(addend) if out is None else torch.add(output, addend, out=out)

    def geglu(self, codes: Any, params: Params, dtype: torch.dtype) -> Codes:
        """Return the codes by `params` of value * gelu(gate), for an output of [value, gate] that has `dtype`."""
        return fused_ops.geglu(self.to_float(codes, dtype), params)

    def group_norm(
        self, codes: Any, norm: nn.GroupNorm, params: Params, dtype: torch.dtype, *, added: Tensor, silu: bool
    ) -> Codes:
        """Return what `fused_ops.group_norm` makes of the layer's output, which has `dtype`."""
        return fused_ops.group_norm(norm, self.to_float(codes, dtype), params, added=added, silu=silu)

    def to_codes(self, codes: Any, params: QuantParams) -> Tensor:
        """Return the codes of the layer's output, uint8. codes: of its input. params: the quantizer of its output.

        The float32 output is multiplied by 1 / delta, as in oneDNN's kernels, whereas `quantize` divides. Where the
        quotient is near a tie, the code may therefore differ by 1 from that of `quantize`.
        """
        scaled = self.to_float(codes, torch.float32).mul_(1 / params.delta).add_(params.zero_point)
        return scaled.round_().clamp_(0, params.high).to(torch.uint8)

    def to_numbers(self, codes: Any, params: QuantParams, unit: float, dtype: torch.dtype) -> Tensor:
        """Return (c - Z) unit in `dtype` for the codes c of the layer's output by `params`, see `to_codes`."""
        return fused_ops.numbers(self.to_codes(codes, params), params, unit, dtype)
