"""Attention of a packed model: its operands are of few bits, its products are float."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """CrossAttention of a packed model."""


class PackedAttentionBlock(PackedAttention, QuantAttentionBlock):
    """AttentionBlock of a packed model."""


PACKED = {QuantCrossAttention: PackedCrossAttention, QuantAttentionBlock: PackedAttentionBlock}


class OncePerContext(nn.Module):
    """A layer whose input, the context, is the same in all steps: computed once, kept until another context comes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._seen: tuple[Tensor, int, Tensor] | None = None  # the context, its version, and what the layer made of it

    def forward(self, context: Tensor) -> Tensor:
        if context.is_inference() or torch.is_grad_enabled():  # no version to tell it by; a graph not to be kept
            return self.layer(context)
        if self._seen is None or self._seen[0] is not context or self._seen[1] != context._version:
            self._seen = (context, context._version, self.layer(context))
        return self._seen[2]
