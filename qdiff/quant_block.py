"""The UNet's blocks, quantized.

A quantized block stands in the slot of a float one (`qdiff.exchange`) and inherits from its class: it computes what
the float block computes, with quantized layers in place of its layers. Only the attention products are overridden, as
their operands are quantized.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock
from qdiff.config import QuantConfig
from qdiff.exchange import Exchanged
from qdiff.quant_layer import act_quantizer, softmax_quantizer

OPERANDS = ("act_quantizer_q", "act_quantizer_k", "act_quantizer_v", "act_quantizer_w")
MAX_SCORES = 2**25  # entries of attention matrices held at once: 128 MiB in float32


class BaseQuantBlock(Exchanged):
    """A block that is reconstructed as one unit. Built from the float block whose slot it takes."""

    def __init__(self, original: nn.Module, config: QuantConfig):
        super().__init__(original)


class QuantizedAttention(Exchanged):
    """Attention with quantizers on its operands: q, k and v, and w, the softmax output."""

    act_quantizer_q: nn.Module
    act_quantizer_k: nn.Module
    act_quantizer_v: nn.Module
    act_quantizer_w: nn.Module

    def __init__(self, original: nn.Module, config: QuantConfig):
        Exchanged.__init__(self, original)
        for name in OPERANDS:
            make = softmax_quantizer if name == "act_quantizer_w" else act_quantizer
            self.add_module(name, make(config))

    @property
    def quantizes_operands(self) -> bool:
        """True while the quantizers are on; always False in a model that quantizes weights only."""
        return getattr(self.act_quantizer_q, "enabled", False)

    def attend_quantized(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v of q [B, heads, N, d] and k, v [B, heads, M, d], each operand quantized.

        Only a few heads are computed at a time, so that at most MAX_SCORES entries of the N x M matrices are in memory.
        For the same reason the backward pass computes the matrices anew.
        """
        scale = q.shape[-1] ** -0.5
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        if mask is not None:
            mask = mask.expand(len(q), q.shape[1], 1, k.shape[2]).flatten(0, 1)
        shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
        step = max(1, MAX_SCORES // (q.shape[1] * k.shape[1]))
        parts = []
        for i in range(0, len(q), step):
            part = slice(i, i + step)
            operands = (q[part], k[part], v[part], None if mask is None else mask[part], scale)
            if torch.is_grad_enabled() and step < len(q):
                parts.append(recompute(self._attend_heads, *operands, use_reentrant=False))
            else:
                parts.append(self._attend_heads(*operands))
        return torch.cat(parts).reshape(*shape[:-1], -1)

    def _attend_heads(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Return softmax(q k^T scale) v of already quantized q, k and v [n, N, d], with the softmax quantized."""
        scores = torch.bmm(q, k.transpose(1, 2)) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return torch.bmm(self.act_quantizer_w(scores.float().softmax(dim=-1).to(v.dtype)), v)


class QuantCrossAttention(QuantizedAttention, CrossAttention):
    """CrossAttention with quantized operands."""

    FIELDS = ("heads", "scale")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v, [B, heads, N, d]; operands are quantized while the quantizers are on."""
        attend = self.attend_quantized if self.quantizes_operands else super().attend
        return attend(q, k, v, mask)


class QuantBasicTransformerBlock(BaseQuantBlock, BasicTransformerBlock):
    """A BasicTransformerBlock with quantized layers; token merging finds it by the name of its base class."""

    FIELDS = ("checkpoint",)


class QuantResBlock(BaseQuantBlock, ResBlock):
    """A ResBlock with quantized layers."""

    FIELDS = ("channels", "out_channels", "use_checkpoint", "use_scale_shift_norm", "updown")


class QuantAttentionBlock(QuantizedAttention, BaseQuantBlock, AttentionBlock):
    """AttentionBlock with quantized operands."""

    FIELDS = ("channels", "num_heads", "use_checkpoint", "use_new_attention_order")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(d)) v, [B, heads, N, d]; operands are quantized while the quantizers are on."""
        attend = self.attend_quantized if self.quantizes_operands else super().attend
        return attend(q, k, v)


QUANTIZED: dict[type[nn.Module], Callable[[nn.Module, QuantConfig], Exchanged]] = {
    ResBlock: QuantResBlock,
    BasicTransformerBlock: QuantBasicTransformerBlock,
    CrossAttention: QuantCrossAttention,
    AttentionBlock: QuantAttentionBlock,
}
