"""Attention of a packed model: its operands are of few bits, its products are float."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import fused_ops
from qdiff.engine.layers import CodesLayer, Range, range_of
from qdiff.quant_block import QuantAttentionBlock, QuantCrossAttention
from qdiff.quant_layer import Quantizer

FINE = 16  # bits of a softmax whose steps, below 2e-5, no picture shows
WHOLE = 0.95  # how far a softmax quantizer must reach to clip nothing that counts
SMALL = 2**20  # entries of a sample's attention matrices up to which they are computed as in the simulation


class PackedAttention(nn.Module):
    """Large products of quantized q, k and v by the fused kernel, which holds no attention matrix.

    It has no place for a quantizer of the softmax: one of 16 bits that reaches to 1 is left out there. Others, and
    small attention, are computed as in the simulation. What is small does not depend on the batch.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v on [B, heads, N, d]."""
        k, v = k.to(q.dtype), v.to(q.dtype)  # those of a context are kept as it came
        if not self._fine() or q.shape[1] * q.shape[2] * k.shape[2] <= SMALL:
            return super().attend(q, k, v) if mask is None else super().attend(q, k, v, mask)
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _fine(self) -> bool:
        softmax = self.act_quantizer_w
        if not isinstance(softmax, Quantizer) or softmax.n_bits < FINE:
            return False
        return float(softmax.delta) * softmax.high >= WHOLE


class PackedCrossAttention(PackedAttention, QuantCrossAttention):
    """CrossAttention of a packed model.

    Below float32 the layers before it end in the codes of q, k and v, and it ends in those of the layer after it. A
    softmax of 16 bits is left out there, whatever its range: bfloat16 is coarser.
    """

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32 or mask is not None or self.act_quantizer_w.n_bits < FINE:
            return super().forward(x, context, mask)
        to_q, to_k, to_v = (range_of(getattr(self, f"act_quantizer_{name}")) for name in "qkv")
        if context is None and isinstance(self.to_k, CodesLayer):
            codes = fused_ops.quantize(x, self.to_q, self.to_k, self.to_v)
            layers = ((self.to_q, to_q), (self.to_k, to_k), (self.to_v, to_v))
            q, k, v = (layer.requantized(own, to) for own, (layer, to) in zip(codes, layers, strict=True))
        else:
            context = x if context is None else context
            q = self.to_q.requantized(self.to_q.quantize(x), to_q)
            k, v = self.to_k.codes(context, to_k), self.to_v.codes(context, to_v)
        out = fused_ops.attention((q, k, v), (to_q, to_k, to_v), self.heads, self.to_out[0], x.dtype)
        return self.to_out[1:](self.to_out[0].product(out, x.dtype))


class PackedAttentionBlock(PackedAttention, QuantAttentionBlock):
    """AttentionBlock of a packed model."""


PACKED = {QuantCrossAttention: PackedCrossAttention, QuantAttentionBlock: PackedAttentionBlock}


class OncePerContext(nn.Module):
    """A layer whose input, the context, is the same in all steps: computed once, kept until another context comes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._seen: tuple[Tensor, int, object, Tensor] | None = None  # the context, its version, what for, the result

    def forward(self, context: Tensor) -> Tensor:
        return self._once(context, None, lambda: self.layer(context))

    def codes(self, context: Tensor, to: Range) -> Tensor:
        """The layer's output as codes."""
        return self._once(context, to, lambda: self.layer.requantized(self.layer.quantize(context), to))

    def _once(self, context: Tensor, purpose: object, compute: Callable[[], Tensor]) -> Tensor:
        if context.is_inference() or torch.is_grad_enabled():  # no version to tell it by; a graph not to be kept
            return compute()
        seen = self._seen
        if seen is None or seen[0] is not context or seen[1] != context._version or seen[2] != purpose:
            self._seen = seen = (context, context._version, purpose, compute())
        return seen[3]
