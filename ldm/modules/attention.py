"""Transformer blocks over the pixels of a feature map, with the prompt as their context."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from ldm.modules.diffusionmodules.util import NORM_GROUPS, checkpoint, normalization, zero_module
from ldm.modules.training_attention import AttentionByHeads, with_mask


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020): [..., dim_in] -> [..., dim_out]."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The two-layer perceptron of a transformer block: [B, N, dim] -> [B, N, dim_out]."""

    def __init__(self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0):
        super().__init__()
        inner = dim * mult
        project_in = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x over a context, or over x itself if there is none."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [B, N, query_dim] for x [B, N, query_dim] and the context [B, M, context_dim].

        mask: bool [B, M], False for the parts of the context that no query sees; or float [B, M], added to the scores.
        """
        context = x if context is None else context
        q, k, v = (
            rearrange(projected, "b n (h d) -> b h n d", h=self.heads)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = rearrange(mask, "b m -> b 1 1 m")
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        out = self.attend(q, k, v, mask)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return softmax(scale q k^T) v of q, k, v [B, heads, N, dim_head]; the N x M matrix is not stored."""
        if self.training and q.requires_grad and q.device.type == "cpu" and (mask is None or mask.dtype != torch.bool):
            if mask is not None:
                q, k = with_mask(q, k, mask, self.scale)
            return AttentionByHeads.apply(q, k, v, self.scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and added to its input."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
    ):
        super().__init__()
        self.attn1 = CrossAttention(query_dim=dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(
            query_dim=dim, context_dim=context_dim, heads=n_heads, dim_head=d_head, dropout=dropout
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Return [B, N, dim] for x [B, N, dim] and the context [B, M, context_dim]."""
        return checkpoint(self._forward, (x, context), self.checkpoint and self.training)

    def _forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H*W pixels (row-major tokens) of a feature map, added to their input."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = True,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        inner = n_heads * d_head
        self.in_channels = in_channels
        self.norm = normalization(in_channels, 1e-6, norm_groups)
        self.proj_in = nn.Conv2d(in_channels, inner, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout=dropout, context_dim=context_dim, checkpoint=use_checkpoint
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, in_channels, kernel_size=1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Return [B, in_channels, H, W] for x [B, in_channels, H, W] and the context [B, M, context_dim]."""
        height = x.shape[2]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height)) + x
