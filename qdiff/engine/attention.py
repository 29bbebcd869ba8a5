"""Attention of a lowered model, on codes where our kernel can run."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import fused_ops
from qdiff.engine.layers import CodesLayer, params_of
from qdiff.engine.quant_params import Codes, QuantParams
from qdiff.engine.step_cache import ContextLayer
from qdiff.exchange import Exchanged
from qdiff.quant_block import QuantAttentionBlock, QuantCrossAttention
from qdiff.quantizers import Quantizer

FINE = 16  # a softmax quantizer of this many bits may be left out: its steps, below 2e-5, are not visible in pictures
WHOLE = 0.95  # a softmax quantizer whose range reaches this far clips nothing that matters
SMALL = 2**20  # up to so many entries in a sample's attention matrices, attention is computed as in the simulation


class LoweredCrossAttention(QuantCrossAttention):
    """CrossAttention of a lowered model, built from the quantized one.

    to_q, to_k and to_v return codes, and the attention returns the input codes of to_out, where
    `fused_ops.attention` does what the quantizers say: with our kernel always; with PyTorch's, in bfloat16 and float16
    only, where the softmax quantizer has 16 bits, and leaves it out, as bfloat16 is coarser. Otherwise attention is
    computed as in the simulation, or fused (see `can_fuse`).

    to_k, to_v: ContextLayers where the attention is over a context.
    """

    to_q: CodesLayer
    to_k: CodesLayer | ContextLayer
    to_v: CodesLayer | ContextLayer
    act_quantizer_q: Quantizer
    act_quantizer_k: Quantizer
    act_quantizer_v: Quantizer
    act_quantizer_w: Quantizer

    def __init__(self, original: QuantCrossAttention):
        Exchanged.__init__(self, original)  # with its quantizers
        self._known: dict[Quantizer, tuple[Tensor, Tensor, QuantParams]] = {}

    def params_of(self, quantizer: Quantizer) -> QuantParams:
        """Return what `layers.params_of` does, which waits for a GPU the first time only, or after a change."""
        known = self._known.get(quantizer)
        if known is None or known[0] is not quantizer.delta or known[1] is not quantizer.zero_point:
            known = self._known[quantizer] = (quantizer.delta, quantizer.zero_point, params_of(quantizer))
        return known[2]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return what CrossAttention.forward returns, plus `residual`, a tensor of that shape, if there is one."""
        operands = (self.act_quantizer_q, self.act_quantizer_k, self.act_quantizer_v)
        params = self.params_of(operands[0]), self.params_of(operands[1]), self.params_of(operands[2])
        if not self._computes_from_codes(x, params):
            output = super().forward(x, context, mask)
            return output if residual is None else output.add_(residual)
        out, last = self._attended(x, context, mask, params), cast(CodesLayer, self.to_out[0])
        if out is None:
            output = super().forward(x, context, mask)
            return output if residual is None else output.add_(residual)
        return last.to_float(out, x.dtype) if residual is None else last.plus(out, residual)

    def _attended(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, params: fused_ops.Three
    ) -> Codes | None:
        """Return the input codes of to_out; None for layers of other kinds."""
        output, integer = cast(CodesLayer, self.to_out[0]).params, self._is_integer(x, params)
        how = "to_codes" if integer else "to_numbers"
        to = [(each,) if integer else (each, fused_ops.unit_of(each, x.dtype), x.dtype) for each in params]
        if isinstance(self.to_k, ContextLayer) and isinstance(self.to_v, ContextLayer):
            context = x if context is None else context
            q = getattr(self.to_q, how)(self.to_q.quantize(x), *to[0])
            k, v = getattr(self.to_k, how)(context, *to[1]), getattr(self.to_v, how)(context, *to[2])
        elif isinstance(self.to_k, CodesLayer) and isinstance(self.to_v, CodesLayer):
            layers = (self.to_q, self.to_k, self.to_v)
            if context is None:
                inputs = fused_ops.quantize(x, *(layer.params for layer in layers))
            else:  # the merged tokens of x
                inputs = [self.to_q.quantize(x), *fused_ops.quantize(context, self.to_k.params, self.to_v.params)]
            q, k, v = (getattr(layer, how)(own, *each) for layer, own, each in zip(layers, inputs, to, strict=True))
        else:
            return None
        if not integer:
            return fused_ops.attention_of_numbers((q, k, v), params, self.heads, output, mask=mask)
        softmax = softmax_params(self.act_quantizer_w)
        return fused_ops.attention((q, k, v), params, self.heads, output, x.dtype, softmax=softmax, mask=mask)

    def _is_integer(self, x: Tensor, params: fused_ops.Three) -> bool:
        """Return whether our kernel can compute the attention."""
        width = round(self.scale**-2)  # of a head
        return fused_ops.has_integer_attention(x.device, params, width) and has_softmax_params(self.act_quantizer_w)

    def _computes_from_codes(self, x: Tensor, params: fused_ops.Three) -> bool:
        """Return whether `fused_ops.attention` is used for an input like x."""
        if any(each.is_wide for each in params):
            return False
        half = x.dtype != torch.float32
        return self._is_integer(x, params) or (half and self.act_quantizer_w.n_bits >= FINE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v, [B, heads, N, d], of q [B, heads, N, d] and k, v [B, heads, M, d]."""
        k, v = k.to(q.dtype), v.to(q.dtype)  # a context may have another dtype
        if not can_fuse(q, k, self.act_quantizer_w):
            return super().attend(q, k, v, mask)
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LoweredAttentionBlock(QuantAttentionBlock):
    """AttentionBlock of a lowered model, built from the quantized one. Large attention is fused, see `can_fuse`."""

    def __init__(self, original: QuantAttentionBlock):
        Exchanged.__init__(self, original)  # with its quantizers

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v of q, k, v [B, heads, N, d], in their shape."""
        if not can_fuse(q, k, self.act_quantizer_w):
            return super().attend(q, k, v)
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        return F.scaled_dot_product_attention(q, k, v)


def has_softmax_params(softmax: Quantizer) -> bool:
    """Return whether the attention kernel knows quantizers of this kind: those whose code of 0 is 0."""
    return not softmax.symmetric and float(softmax.zero_point) == 0


def softmax_params(softmax: Quantizer) -> fused_ops.SoftmaxParams:
    """Return the numbers of a softmax quantizer for the attention kernel; those of none for a kind unknown to it."""
    if not softmax.enabled or not has_softmax_params(softmax):
        return fused_ops.FREE
    return fused_ops.SoftmaxParams(delta=float(softmax.delta), high=softmax.high)


def can_fuse(q: Tensor, k: Tensor, softmax: nn.Module) -> bool:
    """Return whether attention of q [B, heads, N, d] and k [B, heads, M, d] goes through PyTorch's fused kernel.

    The kernel cannot quantize the softmax output, so only attention whose softmax quantizer has 16 bits and a range
    that reaches about 1 is fused, without that quantizer. Small attention is not fused. The limit is one per sample, so
    that a picture does not depend on its batch.
    """
    return (
        q.shape[1] * q.shape[2] * k.shape[2] > SMALL
        and isinstance(softmax, Quantizer)
        and softmax.n_bits >= FINE
        and float(softmax.delta) * softmax.high >= WHOLE
    )
