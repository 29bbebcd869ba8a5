"""Find the network and its transformer blocks inside any model, ours or a third party's."""

from typing import Any

import torch.nn as nn

BLOCK_CLASS = "BasicTransformerBlock"
# The attributes under which a pipeline, a LatentDiffusion, its wrapper or a quantized model keeps the network.
INNER_NAMES = ("unet", "diffusion_model", "model")


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


def check_block(name: str, block: nn.Module) -> None:
    """Raise ValueError if the block lacks one of the layers that tokens can be merged around."""
    missing = [layer for layer in ("attn1", "attn2", "ff") if not hasattr(block, layer)]
    if missing:
        raise ValueError(f"block {name} has no {', '.join(missing)}: token merging does not know this architecture")
