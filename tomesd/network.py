"""Find the network and its transformer blocks inside any model, ours or a third party's."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from .options import MergeOptions

BLOCK_CLASS = "BasicTransformerBlock"
# The attributes under which a pipeline, a LatentDiffusion, its wrapper or a quantized model keeps the network.
INNER_NAMES = ("unet", "diffusion_model", "model")
# The names, here and in diffusers, of what self-attention takes beside its tokens.
CONTEXT_NAMES = ("context", "encoder_hidden_states")  # the tokens of keys and values
MASK_NAMES = ("mask", "attention_mask")  # a number for each key, which is added to its scores


def network_of(model: Any) -> nn.Module:
    """Return the innermost network with transformer blocks; its first argument is the latents.

    Raises ValueError if the model is no module and holds none.
    """
    network = model
    while True:
        inner = [getattr(network, name, None) for name in INNER_NAMES]
        inner = [module for module in inner if isinstance(module, nn.Module) and blocks_of(module)]
        if not inner:
            break
        network = inner[0]
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(model).__name__} is no module and has no `unet`: pass a model or a diffusers pipeline")
    return network


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return name -> transformer block, in the order of the network.

    A block is known by the name of its class or of any ancestor, so that nobody's model has to be imported.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if any(ancestor.__name__ == BLOCK_CLASS for ancestor in type(module).__mro__)
    }


def check_block(name: str, block: nn.Module, options: MergeOptions) -> None:
    """Raise ValueError if the block lacks one of the layers, or its self-attention an argument, that merging needs."""
    missing = [layer for layer in ("attn1", "attn2", "ff") if not hasattr(block, layer)]
    if missing:
        raise ValueError(f"block {name} has no {', '.join(missing)}: token merging does not know this architecture")
    for wanted, option, names in (
        (options.merge_kv, "merge_kv", CONTEXT_NAMES),
        (options.proportional, "proportional", MASK_NAMES),
    ):
        if wanted and argument_name(block.attn1, names) == "":
            raise ValueError(f"attn1 of block {name} takes no {' or '.join(names)}: leave out {option}")


def argument_name(layer: Any, names: Sequence[str]) -> str:
    """Return that of `names` which the layer's forward takes; "" if it takes none of them."""
    taken = inspect.signature(layer.forward).parameters
    return next((name for name in names if name in taken), "")
