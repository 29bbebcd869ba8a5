"""Lower a calibrated UNet: put integer layers, and blocks made for them, into the slots of its quantized ones.

A backend makes the integer layers (`layers.IntegerLayer`): oneDNN on CPUs, our Triton kernels on GPUs
(torch._int_mm where Triton is not there), and the simulation in plain PyTorch. In float32 the simulation and oneDNN
agree bit for bit where `onednn.step_order` knows the order of oneDNN's arithmetic: sums are exact, and all else is
computed in that order. Large attention is the exception (see `attention.can_fuse`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ldm.modules.attention import FeedForward, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.config import QuantConfig
from qdiff.engine.attention import LoweredAttentionBlock, LoweredCrossAttention
from qdiff.engine.backends import onednn
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.blocks import (
    LoweredFeedForward,
    LoweredResBlock,
    LoweredSpatialTransformer,
    LoweredTransformerBlock,
    LoweredUNet,
)
from qdiff.engine.features import has_triton
from qdiff.engine.layers import IntegerLayer, LayerSpec, MakeLayer, integer_layer
from qdiff.engine.step_cache import ContextLayer, StepCache
from qdiff.exchange import check_unmerged, exchange, put_module
from qdiff.quant_block import QuantAttentionBlock, QuantBasicTransformerBlock, QuantCrossAttention, QuantResBlock
from qdiff.quant_model import QuantModel


def fits_bytes(config: QuantConfig) -> bool:
    """Return True if activations are quantized, and both weights and activations have at most 8 bits."""
    return config.quant_act and max(config.weight_bit, config.act_bit) <= 8


def backend_for(config: QuantConfig, device: torch.device) -> MakeLayer:
    """Return the backend that runs a model of this config on this device.

    Raises ValueError, with the reason, if there is none, or none that is exact.
    """
    if not config.quant_act:
        raise ValueError("it computes in whole numbers, and these activations are float")
    if not fits_bytes(config):
        raise ValueError(f"W{config.weight_bit}A{config.act_bit} does not fit into bytes: 8 bits are the most that do")
    if has_triton(device):
        from qdiff.engine.backends.triton_layers import triton_layer  # imports Triton, which takes a second

        return triton_layer
    if device.type == "cuda":
        return int_matmul_layer
    if device.type != "cpu":
        raise ValueError(f"there are no kernels for {device.type}: they run on the CPU and on CUDA")
    largest = onednn.largest_exact_weight()
    if largest == 0:
        raise ValueError("this CPU, or this build of PyTorch, has no exact integer kernels")
    if largest < onednn.LARGEST and 2**config.weight_bit - 1 > largest:
        raise ValueError(
            f"this CPU has no exact integer kernels for weights of {config.weight_bit} bits: its sums of 16 bits "
            "overflow (it has no VNNI instructions); 6 bits are the most"
        )
    return OneDNNLayer if largest == onednn.LARGEST else small_weight_layer


def small_weight_layer(spec: LayerSpec) -> IntegerLayer:
    """Return a layer for a CPU without VNNI: a OneDNNLayer, or a SimulatedLayer if 16-bit sums would overflow.

    Sums of weights of 6 bits or less do not overflow, unless a zero point is not one of the codes.
    """
    fits = bool((spec.weight.short().abs() <= onednn.LARGEST_IN_16_BITS).all())
    return OneDNNLayer(spec) if fits else SimulatedLayer(spec)


def lower(qnn: QuantModel, backend: MakeLayer, *, blocks: bool = True) -> None:
    """Replace all layers of a calibrated model by integer ones of `backend`, in place.

    blocks: replace the blocks, too. Results that are the same in all steps are then computed once (see `step_cache`),
    large attention is fused, and under autocast norms, activation functions and quantization are one pass (see
    `blocks`).

    Float weights are dropped, so lowering cannot be undone: load the model anew. Biases and norms stay float. Merge
    tokens afterwards (`tomesd.apply_patch`). Raises ValueError, and leaves the model as it is, if a layer cannot be
    lowered, tokens are merged, or the model is lowered already.
    """
    qnn.check_float()
    check_unmerged(qnn)
    layers = {}
    for name, layer in qnn.layers().items():
        try:
            layers[name] = integer_layer(layer, backend)
        except ValueError as error:
            raise ValueError(f"{name.removeprefix('model.')}: {error}") from error
    for name, layer in layers.items():
        put_module(qnn, name, layer)
    if blocks:
        _lower_blocks(qnn)
    qnn.forget_float()


def _lower_blocks(qnn: QuantModel) -> None:
    cache = StepCache()
    lowered: dict[type[nn.Module], Callable[..., nn.Module]] = {
        UNetModel: partial(LoweredUNet, step_cache=cache),
        QuantResBlock: partial(LoweredResBlock, step_cache=cache),
        SpatialTransformer: LoweredSpatialTransformer,
        QuantBasicTransformerBlock: LoweredTransformerBlock,
        QuantCrossAttention: LoweredCrossAttention,
        QuantAttentionBlock: LoweredAttentionBlock,
        FeedForward: LoweredFeedForward,
    }
    exchange(qnn, lowered)
    for block in qnn.modules():
        if isinstance(block, LoweredTransformerBlock):  # its second attention is over the context
            block.attn2.to_k = ContextLayer(block.attn2.to_k, cache)
            block.attn2.to_v = ContextLayer(block.attn2.to_v, cache)
