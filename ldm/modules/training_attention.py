"""Attention for training on CPUs, where the backward pass of PyTorch's fused kernel is slow."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AttentionByHeads(torch.autograd.Function):
    """Attention that computes one head of one sample at a time, so that its N x M matrix stays in the cache.

    The backward pass computes that matrix again, as in FlashAttention (Dao et al. 2022), by whole matrix products in
    the dtype of the inputs. On CPUs without AMX this takes less time than `scaled_dot_product_attention` and its
    backward pass where tokens are many, as the 1,024 of 32x32 latents, and no more where they are few.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return softmax(scale q k^T) v, [B, heads, N, e]; q is [B, heads, N, d], k [..., M, d] and v [..., M, e]."""
        queries, keys, values = scaled_heads(q, k, v, scale)
        out = queries.new_empty(*queries.shape[:2], values.shape[2])
        with torch.autocast("cpu", enabled=False):  # which would make the softmax one of float32
            for head, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
                torch.mm(probabilities(query, key), value, out=out[head])
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out.view(*q.shape[:3], v.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        queries, keys, values = scaled_heads(q, k, v, ctx.scale)
        grads = grad.reshape(*queries.shape[:2], values.shape[2])
        grad_q, grad_k, grad_v = (torch.empty_like(heads) for heads in (queries, keys, values))
        for head, (query, key, value, of_out) in enumerate(zip(queries, keys, values, grads, strict=True)):
            p = probabilities(query, key)
            torch.mm(p.t(), of_out, out=grad_v[head])
            of_p = torch.mm(of_out, value.t())
            of_scores = torch.ops.aten._softmax_backward_data(of_p, p, -1, p.dtype)
            torch.mm(of_scores, key, out=grad_q[head])
            torch.mm(of_scores.t(), query, out=grad_k[head])
        return (grad_q * ctx.scale).view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape), None


def with_mask(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return q and k with one more channel, by which scale q k^T has the float mask [B, 1, 1, M] added to it."""
    ones = torch.ones_like(q[..., :1])
    column = (mask / scale).transpose(-1, -2).expand(*k.shape[:-1], 1)
    return torch.cat([q, ones], dim=-1), torch.cat([k, column.to(k.dtype)], dim=-1)


def scaled_heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale q, k and v with samples and heads in one dimension: [B * heads, tokens, channels], contiguous."""
    queries, keys, values = (x.flatten(0, 1).contiguous() for x in (q * scale, k, v))
    return queries, keys, values


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Return softmax(q k^T) of one head, [N, M], for its scaled queries [N, d] and its keys [M, d]."""
    return torch.softmax(torch.mm(query, key.t()), dim=-1)
