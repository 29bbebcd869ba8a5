"""Integer layers against the quantized ones, which are float: shapes, strides, paddings, zero points, splits."""

import pytest
import torch
from torch import nn

from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import OffsetIntegerLayer, SplitIntegerLayer, WideIntegerLayer, integer_layer
from qdiff.engine.quant_params import QuantParams


@pytest.fixture
def backends(cpu_backend):
    """(**settings) -> the backends that run here: the simulation, and oneDNN and int_mm where they are exact.

    On a CPU, torch._int_mm is a product of oneDNN's as well, and overflows where that does.
    """

    def choose(**settings):
        cpu = cpu_backend(**settings)
        return [SimulatedLayer] if cpu is None else [SimulatedLayer, int_matmul_layer, cpu]

    return choose


def relative_error(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_layers_equal_the_quantized_ones(quantized, backends, cases):
    for name, layer, shape, settings in cases:
        x = torch.randn(shape) + 0.7  # zero points away from the middle
        module = quantized(layer, x, **settings)
        for backend in backends(**settings):
            error = relative_error(integer_layer(module, backend)(x), module(x))
            assert error < 2e-6, f"{name} by {backend.__name__}: {error}"


@torch.no_grad()
def test_inputs_of_more_than_8_bits_are_two_products(quantized, backends, cases):
    for name, layer, shape, settings in cases:
        for act in ({"act_bit": 12}, {"act_bit": 16}, {"act_bit": 9, "act_symmetric": True}):
            x = torch.randn(shape) + 0.7
            module = quantized(layer, x, **settings | act)
            for backend in backends(**settings):
                lowered = integer_layer(module, backend)
                assert isinstance(lowered, WideIntegerLayer)
                low, high = lowered.quantize(x).long()
                codes = module.act_quantizer.codes(x) - module.act_quantizer.low
                assert torch.equal(low + 256 * high, codes.long()), name
                error = relative_error(lowered(x), module(x))
                assert error < 2e-6, f"{name}, {act} by {backend.__name__}: {error}"


@torch.no_grad()
def test_split_layers_equal_the_quantized_ones(quantized, backends):
    for bits, split in ((bits, split) for bits in (4, 8) for split in (1, 6, 15)):
        x = torch.cat([torch.randn(2, split, 6, 5) * 3 + 1, torch.rand(2, 16 - split, 6, 5)], dim=1)
        module = quantized(nn.Conv2d(16, 32, 1), x, split, weight_bit=bits)
        for backend in backends(weight_bit=bits):
            lowered = integer_layer(module, backend)
            assert isinstance(lowered, SplitIntegerLayer)
            error = relative_error(lowered(x), module(x))
            assert error < 2e-6, f"{bits} bits, split at {split}, by {backend.__name__}: {error}"


def test_sums_too_large_for_float32_are_exact(quantized, monkeypatch):
    x = torch.rand(2, 20000) + 0.5
    layer = nn.Linear(20000, 3)
    nn.init.uniform_(layer.weight, 0.9, 1.0)  # all codes near the highest
    lowered = integer_layer(quantized(layer, x), SimulatedLayer)
    assert lowered.exact == torch.float64
    numbers = lowered.quantize(x).long() - lowered.params.zero_point
    sums = numbers @ lowered.weight.long().T
    assert sums.max() > 2**24
    delta, step, bias = lowered.params.delta, lowered.step, lowered.bias
    orders = {
        "one by one": sums.float() * delta * step + bias,
        "together": sums.float() * (step * delta) + bias,
    }
    for order, expected in orders.items():
        monkeypatch.setattr("qdiff.engine.backends.onednn.step_order", lambda dtype, order=order: order)
        assert torch.equal(lowered(x), expected), order


def test_zero_points_beyond_the_codes(quantized):
    layer = nn.Linear(512, 2)
    nn.init.constant_(layer.weight, 1.0)
    module = quantized(layer, torch.rand(1, 512))
    module.act_quantizer.set(torch.tensor(0.01), torch.tensor(-5000.0))  # all inputs near 51
    x = torch.rand(3, 512) * 2 + 50.2
    lowered = integer_layer(module, SimulatedLayer)
    assert lowered.exact == torch.float64
    assert relative_error(lowered(x), module(x)) < 2e-6


@torch.no_grad()
def test_autocast_rounds_no_sums(quantized, backends):
    x = torch.randn(2, 32, 8, 8) + 1
    for backend, dtype in ((backend, dtype) for backend in backends() for dtype in (torch.bfloat16, torch.float16)):
        lowered = integer_layer(quantized(nn.Conv2d(32, 16, 3, padding=1), x), backend)
        expected = lowered(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(lowered(x), expected), f"{backend.__name__}, {dtype}"


@torch.no_grad()
def test_steps_keep_their_precision(quantized, backends):
    x = torch.randn(5, 32)
    for backend in backends(weight_bit=8):
        lowered = integer_layer(quantized(nn.Linear(32, 16), x, weight_bit=8), backend)
        expected = lowered(x)
        for cast in (lowered.half, lowered.bfloat16):
            assert torch.equal(cast()(x), expected), backend.__name__


@torch.no_grad()
def test_output_has_the_dtype_of_the_input(quantized, backends):
    x = torch.randn(4, 32)
    for backend in backends():
        lowered = integer_layer(quantized(nn.Linear(32, 16), x), backend)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            out, exact = lowered(x.to(dtype)), lowered(x.to(dtype).float())
            assert out.dtype == dtype
            assert relative_error(out.float(), exact) < 2 * torch.finfo(torch.bfloat16).eps, backend.__name__


def test_codes_are_those_of_the_quantizer(quantized):
    x = torch.randn(1000, 8) * 2
    for settings in ({}, {"act_symmetric": True}, {"act_bit": 3}):
        module = quantized(nn.Linear(8, 4), x[:500], **settings)
        codes = integer_layer(module, SimulatedLayer).quantize(x)
        expected = module.act_quantizer.codes(x) - module.act_quantizer.low
        assert codes.dtype == torch.uint8 and torch.equal(codes.float(), expected), settings


def test_weights_of_8_bits_have_an_offset(quantized):
    x = torch.randn(2, 8)
    weights = nn.Linear(8, 4)
    nn.init.uniform_(weights.weight, 0.5, 1.0)  # zero points at the end of the codes
    module = quantized(weights, x, weight_bit=8)
    lowered = integer_layer(module, SimulatedLayer)
    assert isinstance(lowered, OffsetIntegerLayer)
    assert relative_error(lowered(x), module(x)) < 2e-6


def test_what_does_not_fit_is_refused(quantized):
    for make, shape, settings, says in (
        (lambda: nn.Linear(8, 4), (2, 8), {"weight_bit": 12}, "W12A8 does not fit into bytes"),
        (lambda: nn.Conv2d(8, 8, 3, padding="same"), (2, 8, 5, 5), {}, "padding 'same'"),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 5), {"weight_bit": 8}, "grouped convolution"),
    ):
        layer = make()
        with torch.no_grad():
            layer.weight.uniform_(0.5, 1)
        with pytest.raises(ValueError, match=says):
            integer_layer(quantized(layer, torch.randn(shape), **settings), SimulatedLayer)


def test_a_quantizer_of_no_bytes_is_refused():
    for delta, high in ((0.0, 255), (float("nan"), 255), (0.1, 65536), (0.1, 0)):
        with pytest.raises(ValueError, match="no quantizer of bytes"):
            QuantParams(delta=delta, zero_point=0, high=high)
