"""Integer layers against the simulation, which is float: random shapes, strides, paddings, zero points, splits."""

import copy

import pytest
import torch
from torch import nn

from qdiff.engine.backends import onednn
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.layers import OffsetIntegerLayer, SplitIntegerLayer, integer_layer

ENGINES = [
    ReferenceLayer,
    int_matmul_layer,
    pytest.param(OneDNNLayer, marks=pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")),
]
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 9, 37)),
    "linear of one row": (lambda: nn.Linear(64, 48, bias=False), (1, 64)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 8, 8)),
    "conv, stride 2, odd sizes": (lambda: nn.Conv2d(7, 5, 3, padding=1, stride=2), (1, 7, 9, 11)),
    "conv, 1x1": (lambda: nn.Conv2d(8, 8, 1, bias=False), (3, 8, 5, 4)),
    "conv, kernel 5x3": (lambda: nn.Conv2d(4, 6, (5, 3), padding=(2, 0), stride=(1, 2)), (1, 4, 10, 7)),
    "conv, dilated, of groups": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), (2, 8, 9, 11)),
    "conv of 4 channels": (lambda: nn.Conv2d(4, 32, 3, padding=1), (2, 4, 16, 16)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 1), (2, 6, 13)),
    "conv1d, kernel 3": (lambda: nn.Conv1d(6, 9, 3, padding=1, stride=2), (2, 6, 13)),
}
SETTINGS = {
    "W4A8": {},
    "W8A8": {"weight_bit": 8},
    "W3A5": {"weight_bit": 3, "act_bit": 5},
    "W7A8 by mse": {"weight_bit": 7, "scale_method": "mse"},
    "W4A8, signed activations": {"act_symmetric": True},
}


def relative_error(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_layer_equals_the_simulation(quantized, engine, make, shape, settings):
    layer = make()
    x = torch.randn(shape) + 0.7  # zero points away from the middle
    if settings.get("weight_bit") == 8 and getattr(layer, "groups", 1) > 1:
        pytest.skip("refused, see below")
    module = quantized(layer, x, **settings)
    assert relative_error(integer_layer(module, engine)(x), module(x)) < 2e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("split", [1, 6, 15])
def test_split_layer_equals_the_simulation(quantized, engine, bits, split):
    x = torch.cat([torch.randn(2, split, 6, 5) * 3 + 1, torch.rand(2, 16 - split, 6, 5)], dim=1)
    module = quantized(nn.Conv2d(16, 32, 1), x, split, weight_bit=bits)
    packed = integer_layer(module, engine)
    assert isinstance(packed, SplitIntegerLayer)
    assert relative_error(packed(x), module(x)) < 2e-6


@pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_kernels_equal_the_reference(quantized, make, shape, settings):
    layer = make()
    if settings.get("weight_bit") == 8 and getattr(layer, "groups", 1) > 1:
        pytest.skip("refused, see below")
    x = torch.randn(shape) - 0.3
    module = quantized(layer, x, **settings)
    reference, kernels = (integer_layer(module, engine)(x) for engine in (ReferenceLayer, OneDNNLayer))
    assert relative_error(kernels, reference) < 3e-7 and reference.stride() == kernels.stride()


@pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Conv2d(4, 64, 3, padding=1), (2, 4, 16, 16)),
        (lambda: nn.Conv2d(64, 128, 3, padding=1, stride=2), (2, 64, 16, 16)),
        (lambda: nn.Conv2d(128, 64, 1), (2, 128, 5, 7)),
        (lambda: nn.Conv2d(64, 4, 3, padding=1), (1, 64, 16, 16)),
        (lambda: nn.Linear(64, 512), (2, 77, 64)),
        (lambda: nn.Linear(128, 128, bias=False), (1, 9, 128)),
    ],
    ids=str,
)
def test_of_layers_as_a_unet_has_them_they_do_bit_for_bit(quantized, make, shape):
    x = torch.randn(shape) - 0.3
    module = quantized(make(), x)
    reference, kernels = (integer_layer(module, engine)(x) for engine in (ReferenceLayer, OneDNNLayer))
    assert torch.equal(reference, kernels)


def test_sums_too_large_for_float32_are_exact(quantized):
    x = torch.rand(2, 20000) + 0.5
    layer = nn.Linear(20000, 3)
    nn.init.uniform_(layer.weight, 0.9, 1.0)  # all codes near the highest
    packed = integer_layer(quantized(layer, x), ReferenceLayer)
    assert packed.exact == torch.float64
    numbers = packed.quantize(x).long() - packed.zero_point
    sums = numbers @ packed.weight.long().T
    assert sums.max() > 2**24
    assert torch.equal(packed(x), sums.float() * packed.step + packed.bias)


def test_zero_points_beyond_the_codes(quantized):
    layer = nn.Linear(512, 2)
    nn.init.constant_(layer.weight, 1.0)
    module = quantized(layer, torch.rand(1, 512))
    module.act_quantizer.set(torch.tensor(0.01), torch.tensor(-5000.0))  # all inputs near 51
    x = torch.rand(3, 512) * 2 + 50.2
    reference = integer_layer(module, ReferenceLayer)
    assert reference.exact == torch.float64
    assert relative_error(reference(x), module(x)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_rounds_no_sums(quantized, engine, dtype):
    x = torch.randn(2, 32, 8, 8) + 1
    packed = integer_layer(quantized(nn.Conv2d(32, 16, 3, padding=1), x), engine)
    expected = packed(x)
    with torch.autocast("cpu", dtype):
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_keep_their_precision(quantized, engine):
    x = torch.randn(5, 32)
    packed = integer_layer(quantized(nn.Linear(32, 16), x, weight_bit=8), engine)
    expected = packed(x)
    assert torch.equal(packed.half()(x), expected) and torch.equal(packed.bfloat16()(x), expected)


@pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")
def test_layers_of_kernels_cannot_be_saved_copied_or_moved(quantized):
    packed = integer_layer(quantized(nn.Linear(32, 16), torch.randn(2, 32)), OneDNNLayer)
    for attempt in (
        packed.state_dict,
        lambda: packed.load_state_dict({}),
        lambda: copy.deepcopy(packed),
        lambda: packed.to("meta"),
    ):
        with pytest.raises(NotImplementedError, match="packed"):
            attempt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", ENGINES)
def test_output_is_of_the_dtype_of_the_input(quantized, engine, dtype):
    x = torch.randn(4, 32)
    packed = integer_layer(quantized(nn.Linear(32, 16), x), engine)
    out = packed(x.to(dtype))
    exact = packed(x.to(dtype).float())
    assert out.dtype == dtype
    assert relative_error(out.float(), exact) < 2 * torch.finfo(torch.bfloat16).eps


def test_codes_are_those_of_the_quantizer(quantized):
    x = torch.randn(1000, 8) * 2
    for settings in ({}, {"act_symmetric": True}, {"act_bit": 3}):
        module = quantized(nn.Linear(8, 4), x[:500], **settings)
        codes = integer_layer(module, ReferenceLayer).quantize(x)
        expected = module.act_quantizer.codes(x) - module.act_quantizer.low
        assert codes.dtype == torch.uint8 and torch.equal(codes.float(), expected)


def test_weights_of_8_bits_have_an_offset(quantized):
    x = torch.randn(2, 8)
    weights = nn.Linear(8, 4)
    nn.init.uniform_(weights.weight, 0.5, 1.0)  # zero points at the end of the codes
    module = quantized(weights, x, weight_bit=8)
    packed = integer_layer(module, ReferenceLayer)
    assert isinstance(packed, OffsetIntegerLayer)
    assert relative_error(packed(x), module(x)) < 2e-6


@pytest.mark.parametrize(
    "make, shape, settings, says",
    [
        (lambda: nn.Linear(8, 4), (2, 8), {"act_bit": 9}, "W4A9 does not fit into bytes"),
        (lambda: nn.Linear(8, 4), (2, 8), {"weight_bit": 12}, "W12A8 does not fit into bytes"),
        (lambda: nn.Conv2d(8, 8, 3, padding="same"), (2, 8, 5, 5), {}, "padding 'same'"),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 5), {"weight_bit": 8}, "grouped convolution"),
    ],
)
def test_what_does_not_fit_is_refused(quantized, make, shape, settings, says):
    layer = make()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1)
    with pytest.raises(ValueError, match=says):
        integer_layer(quantized(layer, torch.randn(shape), **settings), ReferenceLayer)
