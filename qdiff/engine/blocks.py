"""The blocks of a lowered UNet. They need fewer passes over memory than the quantized ones.

Each block stands in the slot of the block from which it is built (`qdiff.exchange`). Under autocast all features of the
lowered UNet have autocast's dtype, residual streams included; norms, activation functions and sums compute in float32.
In float32 without our kernels (see `fused_ops.fuses`) the blocks compute what the quantized blocks do.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ldm.modules.attention import FeedForward, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from qdiff.engine import fused_ops
from qdiff.engine.attention import LoweredCrossAttention
from qdiff.engine.features import gpu_kernels
from qdiff.engine.layers import CodesLayer
from qdiff.engine.quant_params import DynamicCodes
from qdiff.engine.step_cache import StepCache, TimeLayer
from qdiff.exchange import Exchanged
from qdiff.quant_block import QuantBasicTransformerBlock, QuantResBlock

PART = 512  # tokens that a feed-forward layer processes together, so that its activations stay in the CPU's cache


class LoweredEnd(nn.Sequential):
    """The last layers of a UNet, a norm, SiLU and a convolution, of which the first two end in codes on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        norm, _, last = self
        if not isinstance(norm, nn.GroupNorm) or not isinstance(last, CodesLayer) or gpu_kernels(x, norm) is None:
            return super().forward(x)
        return last.to_float(fused_ops.group_norm(norm, x, last.params, silu=True), x.dtype)


class LoweredUNet(Exchanged, UNetModel):
    """A UNet whose features have autocast's dtype, or float32 without autocast.

    step_cache: the results that it keeps from step to step within `step_cache.walk`.
    """

    FIELDS = (
        "image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions",
        "dropout", "channel_mult", "conv_resample", "dims", "num_classes", "use_checkpoint", "num_heads",
        "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown",
        "use_new_attention_order", "use_spatial_transformer", "transformer_depth", "context_dim", "legacy",
        "norm_groups", "time_cond_proj_dim",
    )  # fmt: skip

    def __init__(self, original: UNetModel, step_cache: StepCache):
        super().__init__(original)
        self.out = LoweredEnd(*self.out)
        self.step_cache = step_cache

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return what UNetModel.forward returns. dtype: of the features; None: autocast's, or float32 without it."""
        kind = x.device.type
        if dtype is None:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if not torch.is_grad_enabled() and bool((timesteps == timesteps[:1]).all()):
            timesteps = timesteps[:1]  # its embedding is the same for the whole batch
        # With labels y the embedding does not depend on the time alone: it is not kept.
        times = timesteps if y is None else timesteps[:0]
        with torch.autocast(kind, enabled=False), self.step_cache.at(times):
            return super().forward(x, timesteps, context, y, dtype=dtype)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embedding [B, emb_channels] of timesteps [B], in float32 whatever `dtype` is."""
        embedding = timestep_embedding(timesteps, self.model_channels)
        return self.step_cache.of_time(self, lambda: self.time_embed(embedding))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoweredUNet":
        self.step_cache.clear()  # its tensors are on the device that the model leaves
        super()._apply(fn, recurse)
        return self


class LoweredResBlock(QuantResBlock):
    """A ResBlock that adds the time embedding, normalises, applies SiLU and quantizes in one pass."""

    def __init__(self, original: QuantResBlock, step_cache: StepCache):
        Exchanged.__init__(self, original)
        self.emb_layers = TimeLayer(self.emb_layers, step_cache)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not fused_ops.fuses(x) or self.updown or self.use_scale_shift_norm or x.ndim != 4:
            return super()._forward(x, emb)
        first, second = cast(CodesLayer, self.in_layers[2]), cast(CodesLayer, self.out_layers[3])
        norms = cast(nn.GroupNorm, self.in_layers[0]), cast(nn.GroupNorm, self.out_layers[0])
        codes = fused_ops.group_norm(norms[0], x, first.params, silu=True)
        added = self.emb_layers(emb).expand(len(x), -1)
        codes = first.group_norm(codes, norms[1], second.params, x.dtype, added=added, silu=True)
        return second.plus(codes, self.skip_connection(x))


class LoweredSpatialTransformer(Exchanged, SpatialTransformer):
    """A SpatialTransformer that views a channels_last feature map as tokens, without a copy."""

    FIELDS = ("in_channels",)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not fused_ops.fuses(x) or not isinstance(self.proj_in, CodesLayer):
            return super().forward(x, context)
        height, width = x.shape[2:]
        tokens = self.proj_in.to_float(fused_ops.group_norm(self.norm, x, self.proj_in.params), x.dtype)
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        image = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if not isinstance(self.proj_out, CodesLayer):
            return self.proj_out(image).add_(x)
        return self.proj_out.plus(self.proj_out.quantize(image), x)


class LoweredTransformerBlock(QuantBasicTransformerBlock):
    """A transformer block that adds in place.

    attn1, attn2 and ff are called as modules, so that the hooks of token merging see them.
    """

    attn2: LoweredCrossAttention

    def __init__(self, original: QuantBasicTransformerBlock):
        Exchanged.__init__(self, original)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not fused_ops.fuses(x):
            return super()._forward(x, context)
        x = self.attn1(fused_ops.layer_norm(self.norm1, x), residual=x)
        x = self.attn2(fused_ops.layer_norm(self.norm2, x), context=context, residual=x)
        return self.ff(fused_ops.layer_norm(self.norm3, x), residual=x)


class LoweredFeedForward(Exchanged, FeedForward):
    """A feed-forward layer that processes PART tokens at a time on a CPU, from codes to codes."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return [B, N, dim_out] for x [B, N, dim].

        residual: a tensor of the output's shape, to which the output is added in place (if contiguous) and returned.
        """
        proj, out = getattr(self.net[0], "proj", None), self.net[2]
        if not fused_ops.fuses(x) or not isinstance(proj, CodesLayer) or not isinstance(out, CodesLayer):
            output = super().forward(x)
            return output if residual is None else residual.add_(output)
        codes = proj.quantize(x.flatten(0, -2))
        size = PART if x.device.type == "cpu" else max(1, x.shape[:-1].numel())
        parts = codes.split(size) if isinstance(codes, DynamicCodes) else codes.split(size, dim=-2)
        hidden = (proj.geglu(part, out.params, x.dtype) for part in parts)
        if residual is None:
            return torch.cat([out.to_float(part, x.dtype) for part in hidden]).view(*x.shape[:-1], -1)
        residual = residual.contiguous()
        for target, part in zip(residual.flatten(0, -2).split(size), hidden, strict=True):
            out.plus(part, target, out=target)
        return residual
