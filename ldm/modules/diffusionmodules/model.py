"""The encoder and the decoder of the autoencoder."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from ldm.modules.diffusionmodules.util import NORM_GROUPS, normalization


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution or by averaging."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # Padding on the right and at the bottom only, with which the published weights were trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = normalization(in_channels, 1e-6, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, 1e-6, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut_name = None
        if in_channels != out_channels:
            self.shortcut_name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel = 3 if conv_shortcut else 1
            self.add_module(self.shortcut_name, nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        in_place = not torch.is_grad_enabled()  # at the size of a picture of Stable Diffusion, a copy takes 270 MB
        h = self.conv1(F.silu(self.norm1(x), inplace=in_place))
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=in_place)))
        return h + (x if self.shortcut_name is None else getattr(self, self.shortcut_name)(x))


class AttnBlock(nn.Module):
    """Self-attention with one head over all pixels."""

    def __init__(self, in_channels: int, norm_groups: int = NORM_GROUPS):
        super().__init__()
        self.norm = normalization(in_channels, 1e-6, norm_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v)
        )
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Level(nn.Module):
    """One resolution of the encoder or the decoder: residual blocks, each with attention if `attention` is set.

    The owner adds `downsample` or `upsample`, which leads to the next resolution.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, widths: Sequence[int], attention: bool, dropout: float, norm_groups: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=a, out_channels=b, dropout=dropout, norm_groups=norm_groups)
            for a, b in pairwise(widths)
        )
        self.attn = nn.ModuleList(AttnBlock(width, norm_groups) for width in widths[1:] if attention)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """The blocks at the lowest resolution: a residual block, attention, a residual block."""

    def __init__(self, channels: int, dropout: float, norm_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, norm_groups=norm_groups)
        self.attn_1 = AttnBlock(channels, norm_groups)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, norm_groups=norm_groups)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Pictures [B, in_channels, H, W] -> moments [B, 2 z_channels (z_channels unless double_z), H/f, W/f].

    f = 2 ** (len(ch_mult) - 1). `resolution` is the nominal size of pictures, to which `attn_resolutions` refer.
    Raises ValueError for pictures whose sides are not multiples of f.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        self.factor = 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            attention = resolution // 2**i in attn_resolutions
            level = Level([width] + [ch * mult] * num_res_blocks, attention, dropout, norm_groups)
            width = ch * mult
            if i != len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = Middle(width, dropout, norm_groups)
        self.norm_out = normalization(width, 1e-6, norm_groups)
        self.conv_out = nn.Conv2d(width, z_channels * (2 if double_z else 1), 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(n % self.factor for n in x.shape[2:]):
            size = f"{x.shape[3]}x{x.shape[2]}"
            raise ValueError(f"pictures of {size} cannot be encoded: sides must be multiples of {self.factor}")
        h = self.conv_in(x)
        for level in cast(Iterable[Level], self.down[:-1]):
            h = level.downsample(level(h))
        h = self.mid(self.down[-1](h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> pictures [B, out_ch, f h, f w]. The arguments are those of Encoder."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        norm_groups: int = NORM_GROUPS,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout, norm_groups)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            attention = resolution // 2**i in attn_resolutions
            level = Level([width] + [ch * mult] * (num_res_blocks + 1), attention, dropout, norm_groups)
            width = ch * mult
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # in the checkpoints, up.0 has the full resolution
        self.norm_out = normalization(width, 1e-6, norm_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight of the last convolution, to which adversarial losses scale their gradients."""
        return self.conv_out.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for level in cast(Iterable[Level], reversed(self.up[1:])):
            h = level.upsample(level(h))
        h = self.up[0](h)
        return self.conv_out(F.silu(self.norm_out(h)))
