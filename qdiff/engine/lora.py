"""LoRA on a calibrated model: a float low-rank branch beside each integer product.

    y = integer layer(x) + scale alpha/rank up(down(x'))        x' = (c - Z) D, the values that the codes stand for

The branch reads the codes that the layer reads, so that fused blocks need no second path for it: c - Z is a whole
number that bfloat16 holds exactly for 8-bit codes, and D is multiplied into the ranks. It computes in bfloat16 where
the layer's output is bfloat16, else in float32. Nothing is quantized again: the integer layer keeps its numbers, at any
scale, and without its branch it is what it was.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.low_rank import BranchedLayer, LowRankBranch
from qdiff.engine import fused_ops
from qdiff.engine.layers import CodesLayer, SplitIntegerLayer
from qdiff.engine.quant_params import DynamicParams, QuantParams, unsigned, whole_codes
from qdiff.engine.step_cache import ContextLayer, StepCache, TimeLayer
from qdiff.exchange import put_module
from qdiff.quant_layer import QuantModule


class BranchedCodesLayer(CodesLayer):
    """An integer layer of any backend with a branch beside it."""

    def __init__(self, layer: CodesLayer, branch: LowRankBranch):
        super().__init__(layer.params)
        self.layer, self.branch = layer, branch

    def to_float(self, codes: Any, dtype: torch.dtype) -> Tensor:
        output = self.layer.to_float(codes, dtype)
        kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if isinstance(self.params, DynamicParams):  # each token or sample has its own step
            change = self.branch(codes.values(kind), 1.0)
        else:
            change = self.branch(centred(codes, self.params, kind), self.params.delta)
        return output.add_(change.to(dtype))

    def to_codes(self, codes: Any, params: QuantParams) -> Tensor:
        return fused_ops.quantize(self.to_float(codes, torch.float32), params)[0]


class BranchedQuantModule(BranchedLayer):
    """A quantized layer that is not lowered, with a branch that sees the layer's quantized input."""

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        seen = self.layer.quantized_input(x) if isinstance(self.layer, QuantModule) else x
        return output + self.branch(seen).to(output.dtype)


def centred(codes: Tensor, params: QuantParams, dtype: torch.dtype) -> Tensor:
    """Return c - Z in `dtype` of codes c, uint8, [2, ...] if they are wide."""
    if params.is_wide:
        return whole_codes(codes, params).sub_(params.zero_point).to(dtype)
    return unsigned(codes).to(dtype).sub_(params.zero_point)


def convolutions(unet: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the options of the convolutions of a UNet by name: stride, padding, dilation. It is not lowered yet."""
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, QuantModule) and module.options:
            found[name] = dict(module.options)
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            found[name] = {option: getattr(module, option) for option in ("stride", "padding", "dilation")}
    return found


def set_branches(network: nn.Module, branches: Mapping[str, LowRankBranch]) -> None:
    """Put these branches beside the layers that they are named after, in place of all that are there.

    network: a UNet, quantized and lowered or not, or a float text encoder. Without branches it computes what it did
    before the first ones came, bit for bit: the layers themselves are not touched. Results that were kept from step to
    step are dropped.
    """
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, BranchedCodesLayer | BranchedLayer):
            put_module(network, name, module.layer)
    for name, branch in branches.items():
        for slot, part in _slots(network, name, branch):
            put_module(network, slot, branched(network.get_submodule(slot), part))
    for module in network.modules():
        cache = getattr(module, "step_cache", None)
        if isinstance(cache, StepCache):
            cache.clear()


def branched(layer: nn.Module, branch: LowRankBranch) -> nn.Module:
    """Return the layer with a branch beside it."""
    if isinstance(layer, CodesLayer):
        return BranchedCodesLayer(layer, branch)
    return BranchedQuantModule(layer, branch) if isinstance(layer, QuantModule) else BranchedLayer(layer, branch)


def _slots(network: nn.Module, name: str, branch: LowRankBranch) -> list[tuple[str, LowRankBranch]]:
    """Return where the layer of this name stands, with its branch; two places of a split layer.

    A layer whose results are kept stands below a TimeLayer, or in a ContextLayer.
    """
    module, path = network, []
    for part in (*name.split("."), ""):
        if isinstance(module, TimeLayer | ContextLayer):
            path.append("layer")
            module = module.layer
        if part:
            path.append(part)
            module = module.get_submodule(part)
    slot = ".".join(path)
    if not isinstance(module, SplitIntegerLayer):
        return [(slot, branch)]
    halves = (branch.part(slice(module.split)), branch.part(slice(module.split, None)))
    return [(f"{slot}.{half}", part) for half, part in zip(("first", "second"), halves, strict=True)]
