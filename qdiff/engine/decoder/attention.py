"""Attention of one wide head over all pixels of a feature map."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**21  # that are held at a time


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v for q, k, v [1, C, H, W], in the same layout.

    In bfloat16 the products are matrix products of a part of the queries at a time, with the softmax in float32: for a
    head of 512 this is several times as fast as PyTorch's fused attention on CPUs. A term that is the same for all keys
    does not change the softmax, so that keys are taken less their mean, which makes scores small and their rounding
    fine.
    """
    shape, (queries, keys, values) = q.shape, map(_tokens, (q, k, v))
    scale = shape[1] ** -0.5
    if q.dtype != torch.bfloat16:
        out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=scale)[0]
    else:
        keys = (keys.float() - keys.mean(0, dtype=torch.float32)).mul_(scale).to(torch.bfloat16).T
        parts = queries.split(max(1, SCORES // len(values)))
        out = torch.cat([torch.softmax(part @ keys, -1, dtype=torch.float32).bfloat16() @ values for part in parts])
    return out.view(1, *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Return features [1, C, H, W] as [H W, C]; without a copy if they are in channels_last order."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
