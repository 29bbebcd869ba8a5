"""Packed models: integer weights, integer kernels.

`pack` replaces the layers of a calibrated QuantModel by integer ones of the kernels at hand. There is one interface
(`layers.IntegerLayer`), a reference in plain PyTorch, and one implementation a kind of hardware. In float32 they agree
bit for bit, but for large attention (see `attention`): sums are exact, and all else is the same code on the same
numbers in the same order.
"""

import torch

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from qdiff.config import QuantConfig
from qdiff.engine import attention, blocks
from qdiff.engine.attention import OncePerContext
from qdiff.engine.backends import onednn
from qdiff.engine.backends.expanding import low_memory
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.onednn import OneDNNLayer, has_bfloat16
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.blocks import OncePerStep
from qdiff.engine.layers import IntegerLayer, LayerSpec, MakeLayer, integer_layer
from qdiff.quant_model import QuantModel, put_module

PACKED = blocks.PACKED | attention.PACKED  # class of a block -> its class when packed

__all__ = [
    "IntegerLayer",
    "LayerSpec",
    "OneDNNLayer",
    "ReferenceLayer",
    "fits_bytes",
    "has_bfloat16",
    "kernels_for",
    "low_memory",
    "pack",
]


def fits_bytes(config: QuantConfig) -> bool:
    """Whether weights and activations are whole numbers of 8 bits at most: for those there are integer layers."""
    return config.quant_act and max(config.weight_bit, config.act_bit) <= 8


def kernels_for(config: QuantConfig, device: torch.device) -> MakeLayer:
    """The layers that run a model of this config on this device. ValueError, with the reason, if there are none."""
    if not config.quant_act:
        raise ValueError("it computes in whole numbers, and these activations are float")
    if not fits_bytes(config):
        raise ValueError(f"W{config.weight_bit}A{config.act_bit} does not fit into bytes: 8 bits are the most that do")
    if device.type == "cuda":
        return int_matmul_layer
    if device.type != "cpu":
        raise ValueError(f"there are no kernels for {device.type}: they run on the CPU and on CUDA")
    if not onednn.works():
        raise ValueError("this CPU, or this build of PyTorch, has no exact integer kernels")
    return OneDNNLayer


def pack(qnn: QuantModel, make: MakeLayer, *, fast: bool = True) -> None:
    """Replace all layers of a calibrated model by integer ones, in place. No float weight is left but biases and norms.

    fast: make its blocks packed ones, too: what is the same in all steps is computed once, large attention by the fused
    kernel, and under autocast norms, activation functions and quantization together (see `blocks`). Tokens are merged
    afterwards (`tomesd.apply_patch`). There is no way back: load the model anew. Raises ValueError, and leaves the
    model as it is, if a layer cannot be packed.
    """
    qnn.check_float()
    layers = {}
    for name, layer in qnn.layers().items():
        try:
            layers[name] = integer_layer(layer, make)
        except ValueError as error:
            raise ValueError(f"{name.removeprefix('model.')}: {error}") from error
    for name, layer in layers.items():
        put_module(qnn, name, layer)
    qnn.forget_float()
    if fast:
        _pack_blocks(qnn)


def _pack_blocks(qnn: QuantModel) -> None:
    for block in list(qnn.modules()):
        if isinstance(block, BasicTransformerBlock):
            for name in ("to_k", "to_v"):
                setattr(block.attn2, name, OncePerContext(getattr(block.attn2, name)))
        if isinstance(block, ResBlock):
            block.emb_layers = OncePerStep(block.emb_layers)
        if type(block) in PACKED:
            block.__class__ = PACKED[type(block)]
