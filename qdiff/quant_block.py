"""The UNet's blocks, quantized.

A quantized block is of a subclass of its own class: what it computes is inherited, and only the attention products
are overridden. Blocks are converted in place by `convert`, which swaps the class and adds the quantizers of the
attention's operands, and restored by `restore`.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock
from qdiff.config import QuantConfig
from qdiff.quant_layer import act_quantizer, softmax_quantizer

OPERANDS = ("act_quantizer_q", "act_quantizer_k", "act_quantizer_v", "act_quantizer_w")
MAX_SCORES = 2**25  # entries of attention matrices held at once: 128 MiB in float32


class BaseQuantBlock(nn.Module):
    """A block that is reconstructed as one unit."""


class QuantizedAttention(nn.Module):
    """Attention with quantizers on its operands: q, k and v, and w, the softmax output."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T scale) v on [B, heads, N, d], each operand quantized; as inherited where they stay float."""
        if not getattr(self.act_quantizer_q, "enabled", False):  # off, or the identity of a weights-only model
            return super().attend(q, k, v) if mask is None else super().attend(q, k, v, mask)
        scale = q.shape[-1] ** -0.5
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        if mask is not None:
            mask = mask.expand(len(q), q.shape[1], 1, k.shape[2]).flatten(0, 1)
        shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
        step = max(1, MAX_SCORES // (q.shape[1] * k.shape[1]))
        parts = []
        for i in range(0, len(q), step):  # some heads at a time, so that not all N x M matrices are held
            part = slice(i, i + step)
            operands = (q[part], k[part], v[part], None if mask is None else mask[part], scale)
            if torch.is_grad_enabled() and step < len(q):  # nor for the backward pass: they are computed anew
                parts.append(recompute(self._attend_part, *operands, use_reentrant=False))
            else:
                parts.append(self._attend_part(*operands))
        return torch.cat(parts).reshape(*shape[:-1], -1)

    def _attend_part(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Of [n, N, d], with quantized q, k and v."""
        scores = torch.bmm(q, k.transpose(1, 2)) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.bmm(self.act_quantizer_w(scores.float().softmax(dim=-1).to(v.dtype)), v)


class QuantCrossAttention(QuantizedAttention, CrossAttention):
    """CrossAttention with quantized operands."""


class QuantBasicTransformerBlock(BaseQuantBlock, BasicTransformerBlock):
    """Still a BasicTransformerBlock for whoever looks for one, such as token merging."""


class QuantResBlock(BaseQuantBlock, ResBlock):
    """A ResBlock with quantized layers."""


class QuantAttentionBlock(BaseQuantBlock, QuantizedAttention, AttentionBlock):
    """AttentionBlock with quantized operands."""


QUANTIZED = {
    ResBlock: QuantResBlock,
    BasicTransformerBlock: QuantBasicTransformerBlock,
    CrossAttention: QuantCrossAttention,
    AttentionBlock: QuantAttentionBlock,
}
FLOAT = {quantized: kind for kind, quantized in QUANTIZED.items()}


def convert(block: nn.Module, config: QuantConfig) -> None:
    """Make a block of a float class one of its quantized class, in place; other modules are left alone."""
    if type(block) not in QUANTIZED:
        return
    block.__class__ = QUANTIZED[type(block)]
    if isinstance(block, QuantizedAttention):
        for name in OPERANDS:
            make = softmax_quantizer if name == "act_quantizer_w" else act_quantizer
            block.add_module(name, make(config))


def restore(block: nn.Module) -> None:
    """The inverse of `convert`."""
    if type(block) not in FLOAT:
        return
    if isinstance(block, QuantizedAttention):
        for name in OPERANDS:
            delattr(block, name)
    block.__class__ = FLOAT[type(block)]
