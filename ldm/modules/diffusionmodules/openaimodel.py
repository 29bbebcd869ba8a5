"""The UNet that predicts the noise: residual blocks and attention at several resolutions, with skip connections."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.feature_cache import FeatureCache
from ldm.modules.diffusionmodules.util import (
    NORM_GROUPS,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    guidance_embedding,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the timestep embedding: forward(x, emb)."""


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that gives each layer the further input of its type: the embedding, the context or an output size."""

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=padding)

    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Return [B, C', 2h, 2w] for x [B, C, h, w], or [B, C', *size] if a size is given.

        The size is that of the skip connection that follows, which is odd (2h - 1) for latents of odd size. Of three
        dimensions the first is kept, as in video models.
        """
        if size is None:
            grow = [1, 2, 2] if self.dims == 3 else [2] * self.dims
            size = [n * g for n, g in zip(x.shape[2:], grow, strict=True)]
        x = F.interpolate(x, size=tuple(size), mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        out_channels = out_channels or channels
        if not use_conv and out_channels != channels:
            raise ValueError(f"averaging keeps its {channels} channels: use_conv is needed for {out_channels}")
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels, 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block of two convolutions, conditioned on the timestep.

    `up` and `down` also double or halve height and width. With `use_scale_shift_norm`, the embedding is the scale and
    shift of the second norm (FiLM); without, it is added.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.channels = channels
        self.out_channels = out_channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        self.in_layers = nn.Sequential(
            normalization(channels, groups=norm_groups), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        if up:
            self.h_upd, self.x_upd = Upsample(channels, False, dims), Upsample(channels, False, dims)
        elif down:
            self.h_upd, self.x_upd = Downsample(channels, False, dims), Downsample(channels, False, dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels, groups=norm_groups),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Return [B, out_channels, H', W'] for x [B, channels, H, W] and the embedding [B, emb_channels]."""
        return checkpoint(self._forward, (x, emb), self.use_checkpoint and self.training)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        emb_out = emb_out.reshape(*emb_out.shape, *[1] * (h.ndim - emb_out.ndim))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, for models without a context.

    The rows of qkv are all q, all k, all v with `use_new_attention_order`; without it, as in older checkpoints, they
    are q, k, v of one head after the other.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"{channels} channels cannot be split into heads of {num_head_channels}")
            num_heads = channels // num_head_channels
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels, groups=norm_groups)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of x [B, channels, *spatial]."""
        return checkpoint(self._forward, (x,), self.use_checkpoint and self.training)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        layout = "b (s h d) n -> s b h n d" if self.use_new_attention_order else "b (h s d) n -> s b h n d"
        # Contiguous, because the fused kernels, which store no N x N matrix, do not take strided channels.
        q, k, v = rearrange(self.qkv(self.norm(flat)), layout, s=3, h=self.num_heads).contiguous()
        h = self.proj_out(rearrange(self.attend(q, k, v), "b h n d -> b (h d) n"))
        return (flat + h).reshape(x.shape)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T / sqrt(d)) v of q, k, v [B, heads, N, d]."""
        return F.scaled_dot_product_attention(q, k, v)


class GuidedTimeEmbedding(nn.ModuleDict):
    """A time embedding to which a projection of the guidance's embedding is added (LCM, Luo et al., arXiv:2310.04378).

    Its layers are named 0, 1 and 2, as those of a time embedding without guidance are, and cond_proj.
    """

    def __init__(self, channels: int, emb_channels: int, cond_dim: int):
        layers = {"0": nn.Linear(channels, emb_channels), "1": nn.SiLU(), "2": nn.Linear(emb_channels, emb_channels)}
        super().__init__({**layers, "cond_proj": nn.Linear(cond_dim, channels, bias=False)})

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return [B, emb_channels] for the sinusoidal embeddings t [B, channels] and w [B, cond_dim]."""
        return self["2"](self["1"](self["0"](t + self["cond_proj"](w))))


def _refuse_unsupported(use_fp16: bool, n_embed: int | None) -> None:
    """Raise ValueError for what configs of other latent diffusion models ask for."""
    if use_fp16:
        raise ValueError("use_fp16 is not supported: load the model in float16, or run it under autocast")
    if n_embed is not None:
        raise ValueError("n_embed (prediction of codebook ids) is not supported: this UNet predicts noise")


def _time_embedding(channels: int, emb_channels: int, cond_dim: int | None) -> nn.Module:
    """Return the layers of the embedding of the timestep and, with a `cond_dim`, of the guidance."""
    if cond_dim is None:
        return nn.Sequential(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
    if cond_dim < 4:
        raise ValueError(f"time_cond_proj_dim is {cond_dim}: it must be 4 or more, or null")
    return GuidedTimeEmbedding(channels, emb_channels, cond_dim)


class UNetModel(nn.Module):
    """The noise predictor eps(x_t, t, context) of latent diffusion.

    attention_resolutions: downsampling factors at which there is attention (1 is the full size of the latents).
    channel_mult: width of each level, as a multiple of `model_channels`; its length is the number of levels.
    num_heads, num_head_channels: one of them sets the attention heads.
    num_classes: labels of a class-conditional model; None: no label embedding.
    image_size: not used, because any height and width are accepted; the configs give it.
    norm_groups: 32 in all published models; see `normalization` for why a narrow one needs fewer.
    time_cond_proj_dim: width of the embedding of the guidance scale, for models into which guidance was distilled (LCM
        has 256); None: guidance is no input. diffusers' time_embedding.cond_proj is time_embed.cond_proj here.
    """

    feature_cache: FeatureCache | None = None  # set within `feature_cache.cached_features`

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        norm_groups: int = NORM_GROUPS,
        time_cond_proj_dim: int | None = None,
    ):
        super().__init__()
        _refuse_unsupported(use_fp16, n_embed)
        if use_spatial_transformer != (context_dim is not None):
            raise ValueError("use_spatial_transformer and context_dim go together: give both or neither")
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("give num_heads or num_head_channels")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = tuple(attention_resolutions)
        self.dropout = dropout
        self.channel_mult = tuple(channel_mult)
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order
        self.use_spatial_transformer = use_spatial_transformer
        self.transformer_depth = transformer_depth
        self.context_dim = context_dim
        self.legacy = legacy
        self.norm_groups = norm_groups
        self.time_cond_proj_dim = time_cond_proj_dim

        emb = model_channels * 4
        self.time_embed = _time_embedding(model_channels, emb, time_cond_proj_dim)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        skip_channels = self._build_input_blocks(emb)
        width = skip_channels[-1]
        self.middle_block = TimestepEmbedSequential(
            self._res_block(width, emb, width), self._attention(width, num_heads), self._res_block(width, emb, width)
        )
        self._build_output_blocks(emb, skip_channels)
        width = model_channels * self.channel_mult[0]
        self.out = nn.Sequential(
            normalization(width, groups=norm_groups),
            nn.SiLU(),
            zero_module(conv_nd(dims, width, out_channels, 3, padding=1)),
        )

    def _res_block(self, channels: int, emb: int, out_channels: int, **resample: bool) -> ResBlock:
        return ResBlock(
            channels,
            emb,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            norm_groups=self.norm_groups,
            **resample,
        )

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        if self.num_head_channels == -1:
            heads, dim_head = num_heads, channels // num_heads
        else:
            heads, dim_head = channels // self.num_head_channels, self.num_head_channels
        if not self.use_spatial_transformer:
            return AttentionBlock(
                channels,
                num_heads=heads,
                use_checkpoint=self.use_checkpoint,
                use_new_attention_order=self.use_new_attention_order,
                norm_groups=self.norm_groups,
            )
        if self.legacy:
            dim_head = channels // heads
        return SpatialTransformer(
            channels,
            heads,
            dim_head,
            depth=self.transformer_depth,
            context_dim=self.context_dim,
            use_checkpoint=self.use_checkpoint,
            norm_groups=self.norm_groups,
        )

    def _build_input_blocks(self, emb: int) -> list[int]:
        """Build the downward path; return the channels of each skip connection, in order."""
        channels = self.model_channels * self.channel_mult[0]
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, channels, 3, padding=1))]
        skips = [channels]
        factor = 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(channels, emb, mult * self.model_channels)]
                channels = mult * self.model_channels
                if factor in self.attention_resolutions:
                    layers.append(self._attention(channels, self.num_heads))
                blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level != len(self.channel_mult) - 1:
                down = (
                    self._res_block(channels, emb, channels, down=True)
                    if self.resblock_updown
                    else Downsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)
                )
                blocks.append(TimestepEmbedSequential(down))
                skips.append(channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(blocks)
        return skips

    def _build_output_blocks(self, emb: int, skips: list[int]) -> None:
        skips = list(skips)
        channels = skips[-1]
        factor = 2 ** (len(self.channel_mult) - 1)
        blocks = []
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(channels + skips.pop(), emb, self.model_channels * mult)]
                channels = self.model_channels * mult
                if factor in self.attention_resolutions:
                    layers.append(self._attention(channels, self.num_heads_upsample))
                if level and i == self.num_res_blocks:
                    layers.append(
                        self._res_block(channels, emb, channels, up=True)
                        if self.resblock_updown
                        else Upsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)
                    )
                    factor //= 2
                blocks.append(TimestepEmbedSequential(*layers))
        self.output_blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        *,
        guidance: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return eps [B, out_channels, H, W] for x [B, in_channels, H, W] and timesteps [B], which may be fractional.

        context: [B, M, context_dim]. y: labels [B], for class-conditional models alone. guidance: scales [B], for
        models with `time_cond_proj_dim` alone. dtype: type of the features between the layers; None: that of the norms'
        weights. Raises ValueError for missing or unexpected labels or scales, and for an H or W that `resblock_updown`,
        which can only double, cannot give back.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("labels y are for class-conditional models (num_classes), and needed by them")
        if (guidance is not None) != (self.time_cond_proj_dim is not None):
            raise ValueError("guidance scales are for models with time_cond_proj_dim, and needed by them")
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.resblock_updown and any(n % factor for n in x.shape[2:]):
            raise ValueError(f"latents of {tuple(x.shape[2:])} are not multiples of {factor}, as this UNet needs")
        own = cast(nn.GroupNorm, self.out[0]).weight.dtype
        dtype = dtype or own
        emb = self.embed_time(timesteps, dtype) if guidance is None else self.embed_guided(timesteps, guidance, dtype)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = self._features(x.to(dtype), timesteps, emb, context)
        return self.out(h.to(own)).to(x.dtype)

    def _features(
        self, h: torch.Tensor, timesteps: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the last block. Deeper blocks are left out where their features are cached."""
        cache, blocks = self.feature_cache, len(self.output_blocks)
        kept = None if cache is None else cache.begin(timesteps, len(h))
        outer = blocks if cache is None else cache.depth
        skips = []
        for module in self.input_blocks[: None if kept is None else outer]:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context) if kept is None else kept
        for i, module in enumerate(self.output_blocks[0 if kept is None else blocks - outer :], blocks - len(skips)):
            if cache is not None and kept is None and i == blocks - outer:
                cache.keep(h)
            h = torch.cat([h, skips.pop()], dim=1)
            # Upsample to the size of the next skip connection, which is not the double if that size is odd.
            h = module(h, emb, context, size=skips[-1].shape[2:] if skips else None)
        return h

    def embed_time(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the embedding [B, emb_channels] of timesteps [B], in `dtype`."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))

    def embed_guided(self, timesteps: torch.Tensor, guidance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the embedding [B, emb_channels] of timesteps [B] and guidance scales [B], in `dtype`."""
        w = guidance_embedding(guidance, self.time_cond_proj_dim or 0).to(dtype)
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype), w)
