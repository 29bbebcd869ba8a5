"""The bytes that a quantized UNet's weights take in a file, counted by hand."""

import math
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel
from qdiff.checkpoint import quantized_bytes

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def test_bytes_of_a_quantized_unet():
    """Codes of 4 bits, 8 in a word of 4 bytes, and float32 for scales, zero points, ranges, biases and norms."""
    qnn = QuantModel(instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml")), QuantConfig(weight_bit=4))
    qnn.fit_weights()
    for quantizer in qnn.act_quantizers().values():
        quantizer.set(torch.tensor(0.1), torch.tensor(0.0))
    parts = [part for layer in qnn.layers().values() for part in layer.weight_parts().values()]
    plain = sum(parameter.numel() for parameter in qnn.parameters())
    weights = sum(layer.weight.numel() for layer in qnn.layers().values())
    channels = sum(2 * part.shape[0] for part in parts)
    padded = sum(part.shape[0] * math.ceil(part[0].numel() / 8) * 4 for part in parts)
    expected = padded + 4 * (channels + 2 * len(qnn.act_quantizers()) + plain - weights)
    assert quantized_bytes(qnn) == expected
