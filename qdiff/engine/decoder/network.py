"""A decoder made of the weights of an autoencoder, whose convolutions are given as `layers.Convolution`."""

from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Level, ResnetBlock
from qdiff.engine.decoder.layers import Convolution, FloatConvolution, Kernel, MakeConvolution, UpsamplingConvolution


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A residual block: x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), where shortcut(x) may take the place of x."""

    norm1: nn.GroupNorm
    conv1: Convolution
    norm2: nn.GroupNorm
    conv2: Convolution
    shortcut: Convolution | None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention with one head over all pixels: x + proj_out(attention(q, k, v)), [q, k, v] = qkv(norm(x))."""

    norm: nn.GroupNorm
    qkv: Convolution
    proj_out: Convolution


Block = Residual | Attention


@dataclass(frozen=True, kw_only=True)
class DecoderLevel:
    """The blocks of one resolution. upsampling: the way to it from the one before; None for the first."""

    upsampling: UpsamplingConvolution | None
    blocks: tuple[Block, ...]


class FastDecoder:
    """The decoder of an autoencoder with other convolutions: latents [1, z, h, w] -> pictures [1, 3, f h, f w].

    The first convolutions and the last norm and convolution are float32. All others are made by `make`, and features
    between them have its dtype. decoder, post_quant_conv: of the autoencoder; they are read, and not changed.
    Raises ValueError for an autoencoder that doubles without a convolution.
    """

    def __init__(self, decoder: Decoder, post_quant_conv: nn.Conv2d, make: MakeConvolution):
        self.first = [
            FloatConvolution(Kernel.of(name, conv), torch.float32)
            for name, conv in (("post_quant_conv", post_quant_conv), ("conv_in", decoder.conv_in))
        ]
        names: dict[nn.Module, str] = {module: name for name, module in decoder.named_modules()}
        middle, up = decoder.mid, [cast(Level, level) for level in reversed(decoder.up)]
        blocks = [middle.block_1, middle.attn_1, middle.block_2, *_blocks(up[0])]
        levels = [DecoderLevel(upsampling=None, blocks=tuple(_block(each, names, make) for each in blocks))]
        for below, level in pairwise(up):
            conv = below.upsample.conv
            if not isinstance(conv, nn.Conv2d):
                raise ValueError("this autoencoder doubles pictures without a convolution: use --vae float32")
            upsampling = UpsamplingConvolution(Kernel.of(names[conv], conv), make)
            levels.append(
                DecoderLevel(upsampling=upsampling, blocks=tuple(_block(each, names, make) for each in _blocks(level)))
            )
        self.levels = tuple(levels)
        self.norm_out = _norm(decoder.norm_out)
        self.conv_out = FloatConvolution(Kernel.of("conv_out", decoder.conv_out), torch.float32)

    def first_features(self, z: Tensor) -> Tensor:
        """Return the features of latents z [1, z_channels, h, w], in the dtype of the blocks."""
        latents, conv_in = self.first
        x = z.float().contiguous(memory_format=torch.channels_last)
        return conv_in(nn.functional.pad(latents(x), (0, 0, 1, 1))).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features between blocks."""
        first = self.levels[0].blocks[0]
        assert isinstance(first, Residual)
        return first.conv1.dtype


def _blocks(level: Level) -> list[nn.Module]:
    """Return the blocks of a level, in the order in which they run."""
    pairs = zip_longest(level.block, level.attn)
    return [block for pair in pairs for block in pair if block is not None]


def _block(module: nn.Module, names: dict[nn.Module, str], make: MakeConvolution) -> Block:
    def conv(name: str) -> Convolution:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        return make(Kernel.of(names[layer], layer))

    if isinstance(module, AttnBlock):
        kernels = [Kernel.of(f"{names[module]}.qkv", layer) for layer in (module.q, module.k, module.v)]
        return Attention(norm=_norm(module.norm), qkv=make(Kernel.joined(kernels)), proj_out=conv("proj_out"))
    assert isinstance(module, ResnetBlock)
    return Residual(
        norm1=_norm(module.norm1),
        conv1=conv("conv1"),
        norm2=_norm(module.norm2),
        conv2=conv("conv2"),
        shortcut=None if module.shortcut_name is None else conv(module.shortcut_name),
    )


def _norm(norm: nn.GroupNorm) -> nn.GroupNorm:
    """Return a norm with weights of its own, in float32."""
    own = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps, device=norm.weight.device)
    own.load_state_dict(norm.state_dict())
    return own.requires_grad_(False)
