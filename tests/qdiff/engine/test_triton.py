"""Triton's kernels against the simulation: on a GPU, or by Triton's interpreter with TRITON_INTERPRET=1."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import LayerSpec, integer_layer
from qdiff.engine.quant_params import QuantParams, signed, unsigned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from qdiff.engine.backends import triton_elementwise  # noqa: E402
from qdiff.engine.backends.triton_kernels import CODES, FLOAT, PLUS  # noqa: E402
from qdiff.engine.backends.triton_layers import Tiling, TritonLayer, tiling, triton_layer  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALVES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)  # its bfloat16 is cut off, not rounded
HALF = HALVES[-1]
TO = QuantParams(delta=0.031, zero_point=113, high=255)
FEW = QuantParams(delta=0.4, zero_point=3, high=15)
SMALL = Tiling(rows=16, outputs=16, inputs=32)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """PyTorch's own convolutions are not rounded to TF32, which they are on GPUs by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def plain_spec(outputs, channels, kernel=(), zero_point=77, high=255, bias=True, **options):
    """A layer of random whole weights of 4 bits."""
    weight = torch.randint(-15, 16, (outputs, channels, *kernel), dtype=torch.int8, device=DEVICE)
    defaults = {"stride": (1,) * len(kernel), "padding": (0,) * len(kernel), "dilation": (1,) * len(kernel)}
    return LayerSpec(
        weight=weight,
        step=torch.rand(outputs, device=DEVICE) * 0.01 + 0.001,
        bias=torch.randn(outputs, device=DEVICE) if bias else None,
        params=QuantParams(delta=0.02, zero_point=zero_point, high=high),
        options={"groups": 1} | defaults | options if kernel else None,
    )


def sums_of(spec, codes):
    """The exact sums of a layer, in float64."""
    numbers, weight = (codes.double() - spec.params.zero_point), spec.weight.double()
    if spec.options is None:
        return F.linear(numbers, weight)
    return F.conv2d(numbers, weight, **spec.options)


def random_codes(*shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    return codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes


LAYERS = {
    "linear": (plain_spec(24, 64), (5, 7, 64)),
    "linear of odd sizes": (plain_spec(37, 19), (3, 19)),
    "one row": (plain_spec(48, 64, bias=False), (1, 64)),
    "conv": (plain_spec(24, 32, (3, 3), padding=(1, 1)), (2, 32, 6, 5)),
    "conv of 4 channels": (plain_spec(17, 4, (3, 3), padding=(1, 1), zero_point=0), (1, 4, 5, 5)),
    "conv, stride 2": (plain_spec(16, 8, (3, 3), padding=(1, 1), stride=(2, 2), zero_point=255), (2, 8, 7, 6)),
    "conv, kernel 5x3": (plain_spec(6, 4, (5, 3), padding=(2, 0), stride=(1, 2)), (1, 4, 10, 7)),
    "conv of a small map": (plain_spec(8, 8, (3, 3), padding=(1, 1)), (2, 8, 1, 1)),
    "conv, 1x1": (plain_spec(40, 64, (1, 1)), (2, 64, 3, 5)),
    "conv, 1x1, stride 2": (plain_spec(8, 8, (1, 1), stride=(2, 2)), (1, 8, 5, 5)),
}


@torch.no_grad()
def test_sums_are_exact():
    for name, (spec, shape) in LAYERS.items():
        codes, unit = random_codes(*shape), replace(spec.params, delta=1.0)
        whole = replace(spec, step=torch.ones_like(spec.step), bias=None, params=unit)
        for tiles in (SMALL, replace(SMALL, split=3), None):
            sums = TritonLayer(whole)._compute(codes, FLOAT, torch.float32, tiles=tiles)
            assert torch.equal(sums.double(), sums_of(spec, codes)), f"{name}, {tiles}"


@torch.no_grad()
def test_layers_equal_simulated_ones():
    for name, (spec, shape) in LAYERS.items():
        codes, ours, simulated = random_codes(*shape), TritonLayer(spec), SimulatedLayer(spec)
        expected = simulated.to_float(codes, torch.float32)
        assert_near(ours.to_float(codes, torch.float32), expected, 3e-7, name)
        assert_near(ours.to_float(signed(codes), torch.float32), expected, 3e-7, name)
        for dtype in HALVES:
            output = ours.to_float(codes, dtype)
            assert output.dtype == dtype, name
            assert_near(output.float(), expected, torch.finfo(dtype).eps, name)
            addend = torch.randn_like(expected).to(dtype)
            assert torch.equal(ours.plus(codes, addend), output + addend), f"{name}, {dtype}"
        produced, made = unsigned(ours.to_codes(codes, TO)).float(), simulated.to_codes(codes, TO).float()
        assert (produced - made).abs().max() <= 1 and (produced != made).float().mean() < 0.01, name
        for dtype, unit in ((HALF, 0.031), (torch.float16, 1.0)):
            numbers = ours.to_numbers(codes, TO, unit, dtype)
            assert torch.equal(numbers, ((produced - TO.zero_point) * unit).to(dtype)), f"{name}, {dtype}"


@torch.no_grad()
def test_parts_are_finished_like_whole_sums():
    spec, shape = LAYERS["conv"]
    codes, layer = random_codes(*shape), TritonLayer(spec)
    addend = torch.randn(2, 24, 6, 5, device=DEVICE).to(HALF).contiguous(memory_format=torch.channels_last)
    for kind, dtype, more in (
        (FLOAT, HALF, {}),
        (PLUS, HALF, {"addend": addend}),
        (CODES, torch.int8, {"to": TO}),
    ):
        whole = layer._compute(codes, kind, dtype, tiles=SMALL, **more)
        for split in (2, 5, 9):
            parts = layer._compute(codes, kind, dtype, tiles=replace(SMALL, split=split), **more)
            assert torch.equal(whole, parts), (kind, split)


def assert_near(actual, expected, limit, name):
    assert actual.shape == expected.shape, name
    assert ((actual - expected).abs() <= limit * expected.abs().max()).all(), name


@torch.no_grad()
def test_layers_equal_the_quantized_ones(quantized, cases):
    for name, layer, shape, settings in cases:
        x = torch.randn(shape) + 0.7
        module = quantized(layer, x, **settings).to(DEVICE)
        lowered = integer_layer(module, triton_layer).to(DEVICE)
        assert_near(lowered(x.to(DEVICE)), module(x.to(DEVICE)), 2e-6, name)


@torch.no_grad()
def test_gated_products():
    for rows, channels, width in ((37, 64, 24), (5, 32, 8)):
        layer = TritonLayer(plain_spec(2 * width, channels))
        codes = random_codes(rows, channels)
        for dtype in HALVES:
            value, gate = layer.to_float(codes, dtype).double().chunk(2, dim=-1)
            assert_close_codes(layer.geglu(codes, TO, dtype), value * F.gelu(gate), TO, 0.002)


@torch.no_grad()
def test_outputs_in_place():
    layer = TritonLayer(plain_spec(24, 64))
    codes, residual = random_codes(33, 64), torch.randn(33, 24, device=DEVICE).to(HALF)
    expected = layer.to_float(codes, HALF) + residual
    assert layer.plus(codes, residual, out=residual) is residual
    assert torch.equal(residual, expected)


def test_others_get_another_backend():
    grouped = replace(
        plain_spec(8, 4, (3, 3)), options={"groups": 2, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    )
    dilated = plain_spec(8, 4, (3, 3), dilation=(2, 2))
    for spec in (grouped, dilated, plain_spec(8, 8, zero_point=-3)):
        assert not isinstance(triton_layer(spec), TritonLayer)
    assert isinstance(triton_layer(plain_spec(8, 8)), TritonLayer)


def test_tilings_cover_the_layers_of_stable_diffusion():
    for rows in (2, 128, 154, 512, 2048, 8192, 32768):
        for outputs in (4, 320, 640, 1280, 2560, 10240):
            for channels in (4, 320, 640, 960, 1280, 1920, 2560):
                for places in (1, 9):
                    by = tiling(rows, outputs, channels, places)
                    assert by.split == 1 or by.split * 2 <= places * -(-channels // by.inputs)


def test_convolutions_are_divided_as_was_fastest():
    """On an H100, or less than 5 % slower."""
    for rows, outputs, channels, fastest in (
        (8192, 320, 320, (128, 64, 64, 1)), (8192, 320, 960, (128, 64, 64, 1)), (8192, 640, 640, (128, 64, 64, 1)),
        (2048, 640, 640, (64, 128, 64, 2)), (2048, 640, 1280, (64, 128, 64, 2)), (2048, 640, 1920, (64, 128, 64, 2)),
        (512, 1280, 1280, (64, 128, 64, 4)), (512, 1280, 2560, (64, 128, 64, 4)),
    ):  # fmt: skip
        by = tiling(rows, outputs, channels, 9)
        assert (by.rows, by.outputs, by.inputs, by.split) == fastest


# --- elementwise -------------------------------------------------------------------------------------------


def exact_codes(x, to):
    return (x.double() / to.delta).round().add(to.zero_point).clamp(0, to.high)


def assert_close_codes(codes, values, to, share=0.005):
    """Codes of these float64 values, but for some that are next to the edge of two."""
    difference = (unsigned(codes).double() - exact_codes(values, to)).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < share


def feature_map(*shape, dtype=HALF):
    return (torch.randn(shape, device=DEVICE) * 1.7 + 0.4).to(dtype).contiguous(memory_format=torch.channels_last)


def test_codes_are_those_of_the_quantizer_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, x in {
            "tokens": torch.randn(3, 5, 700, device=DEVICE).to(dtype),
            "feature map": feature_map(2, 33, 5, 7, dtype=dtype),
            "its last channels": feature_map(2, 64, 4, 4, dtype=dtype)[:, 24:],
            "channels first": torch.randn(2, 6, 4, 4, device=DEVICE).to(dtype),
            "strided": torch.randn(2, 3, 4, device=DEVICE).to(dtype)[..., ::2],
            "extremes": torch.tensor([1e30, -1e30, 0.0, 0.0155, 0.0465], device=DEVICE).to(dtype),
        }.items():
            each = (TO, FEW, TO, FEW)
            for codes, to in zip(triton_elementwise.quantize(x, each), each, strict=True):
                delta = torch.tensor(to.delta, device=DEVICE)  # by a number, PyTorch multiplies by its inverse on GPUs
                expected = ((x.float() / delta).round() + to.zero_point).clamp(0, to.high)
                assert torch.equal(unsigned(codes).float(), expected), f"{name}, {dtype}, {to}"


def test_numbers_of_codes():
    codes = random_codes(3, 70)
    for dtype, step in ((torch.bfloat16, 1.0), (torch.float16, 0.031), (torch.float16, 1.0)):
        expected = ((codes.float() - 113) * step).to(dtype)
        assert torch.equal(triton_elementwise.numbers(codes, 113, step, dtype), expected)


@torch.no_grad()
def test_group_norm():
    for shape, groups in (((2, 64, 6, 5), 8), ((1, 40, 17, 16), 4), ((3, 8, 1, 1), 2)):
        norm = nn.GroupNorm(groups, shape[1], device=DEVICE)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        x, added = feature_map(*shape), torch.randn(shape[:2], device=DEVICE)
        for more, silu in ((None, False), (None, True), (added, False), (added, True)):
            codes = triton_elementwise.group_norm(norm, x, TO, more, silu)
            y = x.double() if more is None else x.double() + more.double()[:, :, None, None]
            y = F.group_norm(y, groups, norm.weight.double(), norm.bias.double(), norm.eps)
            assert_close_codes(codes, F.silu(y) if silu else y, TO)
    norm = nn.GroupNorm(4, 16, device=DEVICE)
    x = (torch.randn(1, 16, 32, 32, device=DEVICE) + 300).to(HALF)
    assert_close_codes(triton_elementwise.group_norm(norm, x, TO, None, False), F.group_norm(x.double(), 4), TO)


@torch.no_grad()
def test_layer_norm_and_geglu():
    for shape in ((2, 7, 320), (5, 9)):
        norm = nn.LayerNorm(shape[-1], device=DEVICE)
        nn.init.normal_(norm.weight, 1, 0.3)
        x = (torch.randn(shape, device=DEVICE) * 3 + 20).to(HALF)
        y, expected = triton_elementwise.layer_norm(norm, x), F.layer_norm(x.double(), shape[-1:], norm.weight.double())
        assert y.dtype == x.dtype and ((y.double() - expected).abs() <= 0.005 * expected.abs() + 1e-3).all()
    x = torch.randn(3, 11, 2 * 70, device=DEVICE).mul_(3).to(HALF)
    value, gate = x.double().chunk(2, dim=-1)
    assert_close_codes(triton_elementwise.geglu(x, TO), value * F.gelu(gate), TO)
