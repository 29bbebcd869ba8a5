"""Layers that expand their weights when they run."""

import torch
from torch import nn

from qdiff.engine.backends.expanding import ExpandingLayer, expanding
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import IntegerLayer, integer_layer
from qdiff.engine.quant_params import QuantParams

PARAMS = QuantParams(delta=0.05, zero_point=120, high=255)


def bytes_of(layer):
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())


@torch.no_grad()
def test_it_computes_the_same_from_fewer_bytes(quantized, cpu_backend):
    makers = {
        "linear": (lambda: nn.Linear(257, 64), (3, 257)),
        "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 5)),
    }
    for (name, (make, shape)), bits in ((item, bits) for item in makers.items() for bits in (2, 3, 4)):
        for backend in filter(None, (SimulatedLayer, cpu_backend(weight_bit=bits))):
            case = f"{name} of {bits} bits by {backend.__name__}"
            module = quantized(make(), torch.randn(shape), weight_bit=bits)
            plain, small = integer_layer(module, backend), integer_layer(module, expanding(backend))
            assert isinstance(small, ExpandingLayer) and isinstance(small, IntegerLayer), case
            x = torch.randn(shape)
            assert torch.equal(small(x), plain(x)), case
            codes = plain.quantize(x)
            assert torch.equal(small.to_codes(codes, PARAMS), plain.to_codes(codes, PARAMS)), case
            assert bytes_of(small) < module.weight.numel() * bits / 8 * 1.15 + 8 * len(module.weight), case


def test_of_8_bits_there_is_nothing_to_save(quantized):
    module = quantized(nn.Linear(64, 8), torch.randn(3, 64), weight_bit=8)
    assert isinstance(integer_layer(module, expanding(SimulatedLayer)).layer, SimulatedLayer)
