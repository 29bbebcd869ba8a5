"""Layers that expand their weights when they run."""

import pytest
import torch
from torch import nn

from qdiff.engine.backends import onednn
from qdiff.engine.backends.expanding import ExpandingLayer, low_memory
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.layers import IntegerLayer, Range, integer_layer


def bytes_of(layer):
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())


KERNELS = pytest.param(OneDNNLayer, marks=pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels"))


@pytest.mark.parametrize("engine", [ReferenceLayer, KERNELS])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "layer, shape", [(nn.Linear(257, 64), (3, 257)), (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 5))], ids=str
)
@torch.no_grad()
def test_it_computes_the_same_from_fewer_bytes(quantized, engine, layer, shape, bits):
    module = quantized(layer, torch.randn(shape), weight_bit=bits)
    plain, small = integer_layer(module, engine), integer_layer(module, low_memory(engine))
    assert isinstance(small, ExpandingLayer) and isinstance(small, IntegerLayer)
    x, to = torch.randn(shape), Range(delta=0.05, zero_point=120, high=255)
    assert torch.equal(small(x), plain(x))
    assert torch.equal(small.requantized(small.quantize(x), to), plain.requantized(plain.quantize(x), to))
    assert bytes_of(small) < module.weight.numel() * bits / 8 * 1.15 + 8 * len(module.weight)


def test_of_8_bits_there_is_nothing_to_save(quantized):
    module = quantized(nn.Linear(64, 8), torch.randn(3, 64), weight_bit=8)
    assert isinstance(integer_layer(module, low_memory(ReferenceLayer)).layer, ReferenceLayer)
