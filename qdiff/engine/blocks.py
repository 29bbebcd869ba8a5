"""The blocks of a packed UNet: those of a quantized one, with fewer passes over memory below float32.

Under autocast the packed UNet runs in its dtype as a whole, residual streams included; only norms, activation functions
and sums compute in float32 within. In float32 blocks do what they inherit.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import FeedForward, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel, timestep_embedding
from qdiff.engine import fused_ops
from qdiff.engine.layers import CodesLayer
from qdiff.quant_block import QuantBasicTransformerBlock, QuantResBlock

STEPS_KEPT = 64  # of time embeddings
PART = 512  # tokens that go through a feed-forward layer together


class PackedUNet(UNetModel):
    """Its dtype is that of autocast, else float32. The embedding of a time is computed once, and kept."""

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        kind = x.device.type
        self._dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        with torch.autocast(kind, enabled=False):
            return super().forward(x, timesteps, context, y)

    def working_dtype(self) -> torch.dtype:
        return self._dtype

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, emb_channels], or [1, emb_channels] where all are the same; in float32."""
        same = bool((timesteps == timesteps[0]).all())
        if not same or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.time_embed(timestep_embedding(timesteps, self.model_channels))
        kept = vars(self).setdefault("_embeddings", OrderedDict())
        one = timesteps[:1]
        return _kept(kept, one.item(), lambda: self.time_embed(timestep_embedding(one, self.model_channels)))


class OncePerStep(nn.Module):
    """A layer of the time embedding: computed once for each that PackedUNet keeps."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._outputs: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # id of an embedding -> it, the output

    def forward(self, emb: Tensor) -> Tensor:
        if len(emb) > 1 or torch.is_grad_enabled() or emb.is_inference():
            return self.layer(emb)
        # Embeddings are held, so that no other one gets their id while it is here.
        return _kept(self._outputs, id(emb), lambda: (emb, self.layer(emb)))[1]


def _kept(kept: OrderedDict, key: object, compute: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = compute()
        if len(kept) > STEPS_KEPT:
            kept.popitem(last=False)
    return kept[key]


class PackedResBlock(QuantResBlock):
    """Norm, SiLU and quantization are one pass, as is the addition of the time embedding."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if x.dtype == torch.float32 or self.updown or self.use_scale_shift_norm or x.ndim != 4:
            return super()._forward(x, emb)
        first, second = self.in_layers[2], self.out_layers[3]
        h = first.product(fused_ops.group_norm(self.in_layers[0], x, first, silu=True), x.dtype)
        added = self.emb_layers(emb).expand(len(x), -1)
        h = second.product(fused_ops.group_norm(self.out_layers[0], h, second, added=added, silu=True), x.dtype)
        return h.add_(self.skip_connection(x))


class PackedTransformer(SpatialTransformer):
    """Its tokens are the feature map in channels_last order, as it is."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32 or not isinstance(self.proj_in, CodesLayer):
            return super().forward(x, context)
        height, width = x.shape[2:]
        tokens = self.proj_in.product(fused_ops.group_norm(self.norm, x, self.proj_in), x.dtype)
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)).add_(x)


class PackedTransformerBlock(QuantBasicTransformerBlock):
    """Sums are added in place. Tokens are merged by hooks of attn1, attn2 and ff, which are called as modules."""

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32:
            return super()._forward(x, context)
        x = self.attn1(fused_ops.layer_norm(self.norm1, x)).add_(x)
        x = self.attn2(fused_ops.layer_norm(self.norm2, x), context=context).add_(x)
        h = fused_ops.layer_norm(self.norm3, x)
        if self.ff._forward_hooks:  # which want its output alone
            return self.ff(h).add_(x)
        return self.ff(h, residual=x)


class PackedFeedForward(FeedForward):
    """A part of the tokens at a time, from codes to codes; what is between stays in the cache."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: of x's shape, to which the output is added in place."""
        proj, out = getattr(self.net[0], "proj", None), self.net[2]
        if x.dtype == torch.float32 or not isinstance(proj, CodesLayer) or not isinstance(out, CodesLayer):
            output = super().forward(x)
            return output if residual is None else residual.add_(output)
        codes = proj.quantize(x).flatten(0, -2).split(PART)
        outputs = (out.product(fused_ops.geglu(proj.product(part, x.dtype), out), x.dtype) for part in codes)
        if residual is None:
            return torch.cat(list(outputs)).view(*x.shape[:-1], -1)
        residual = residual.contiguous()
        for part, output in zip(residual.flatten(0, -2).split(PART), outputs, strict=True):
            part.add_(output)
        return residual


PACKED = {
    UNetModel: PackedUNet,
    QuantResBlock: PackedResBlock,
    SpatialTransformer: PackedTransformer,
    QuantBasicTransformerBlock: PackedTransformerBlock,
    FeedForward: PackedFeedForward,
}
