"""The least time that the products of a UNet call can take: its operations divided by the integer kernels' peak.

The peak is that of a large convolution, linear layer and attention of Stable Diffusion v1, measured in the same run.
The floor cannot be reached: small layers are slower, and all that is no product is left out.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsdiff.benchmark.variants import float_precision
from qdiff.config import QuantConfig
from qdiff.engine import fused_ops
from qdiff.engine.layers import IntegerLayer, LayerSpec
from qdiff.engine.lower import backend_for
from qdiff.engine.quant_params import QuantParams

LATENTS, TOKENS, HEADS, WIDTH, CONTEXT = 64, 4096, 8, 40, 1280  # of Stable Diffusion v1's largest layers
INPUT = QuantParams(delta=0.01, zero_point=128, high=255)


def peaks(config: QuantConfig, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the operations per second of the largest products, by kind. seconds: spent on each kind."""
    dtype = torch.bfloat16 if float_precision("int8", device) == "autocast" else torch.float32
    channels = HEADS * WIDTH
    convolution = layer(config, device, channels, channels, {"stride": (1, 1), "padding": (1, 1)})
    linear = layer(config, device, CONTEXT, channels)
    feature_map = codes(2, channels, LATENTS, LATENTS).contiguous(memory_format=torch.channels_last)
    rows, tokens = codes(2 * TOKENS, CONTEXT), codes(2, TOKENS, channels)
    work = {
        "convolutions": (2 * feature_map.numel() * 9 * channels, lambda: convolution.to_float(feature_map, dtype)),
        "linear layers": (2 * rows.numel() * channels, lambda: linear.to_float(rows, dtype)),
        "attention": (2 * 2 * tokens.numel() * TOKENS, lambda: attention(tokens, dtype)),
    }
    with torch.no_grad():
        return {kind: count / best_seconds(call, seconds) for kind, (count, call) in work.items()}


def layer(
    config: QuantConfig, device: torch.device, inputs: int, outputs: int, options: Mapping[str, Any] | None = None
) -> IntegerLayer:
    """Return a linear layer of random weights or, with options, a 3x3 convolution."""
    high = 2 ** (config.weight_bit - 1) - 1
    kernel = () if options is None else (3, 3)
    spec = LayerSpec(
        weight=torch.randint(-high, high + 1, (outputs, inputs, *kernel), dtype=torch.int8),
        step=torch.full((outputs,), 0.01),
        bias=torch.zeros(outputs),
        params=INPUT,
        options=None if options is None else {"dilation": (1, 1), "groups": 1, **options},
    )
    return backend_for(config, device)(spec)


def attention(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Attend to the tokens themselves. tokens: codes [B, N, HEADS * WIDTH]."""
    return fused_ops.attention((tokens, tokens, tokens), (INPUT, INPUT, INPUT), HEADS, INPUT, dtype)


def codes(*shape: int) -> Tensor:
    """Return random codes, uint8."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def best_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Return the time of the fastest of the calls that fit into `seconds`, of one call at least."""
    begin, best = time.perf_counter(), float("inf")
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def floor_seconds(operations: Mapping[str, int], peak: Mapping[str, float]) -> float:
    """Return the operations of a call, by kind, over their peaks. Kinds without a peak are left out."""
    return sum(operations.get(kind, 0) / rate for kind, rate in peak.items())
