"""oneDNN's integer layers are the simulated ones, bit for bit, and what is not exact is refused."""

import copy

import pytest
import torch
from torch import nn

from qdiff.engine import cpu
from qdiff.engine.backends import onednn
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import LayerSpec, integer_layer
from qdiff.engine.lower import small_weight_layer
from qdiff.engine.quant_params import QuantParams

HAS_KERNELS = pytest.mark.skipif(onednn.largest_exact_weight() == 0, reason="PyTorch was built without oneDNN")
VNNI = ("AVX2_VNNI", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
BYTES = QuantParams(delta=0.037, zero_point=113, high=255)


def agree(quantized, cpu_backend, assert_backends_agree, cases, output):
    """Compare output(layer, x) of both backends; return how many cases ran."""
    ran = 0
    for name, layer, shape, settings in cases:
        backend = cpu_backend(**settings)
        if backend is None:
            continue
        x = torch.randn(shape) - 0.3
        module = quantized(layer, x, **settings)
        simulated, kernels = (output(integer_layer(module, make), x) for make in (SimulatedLayer, backend))
        assert_backends_agree(kernels, simulated, name)
        ran += 1
    return ran


@HAS_KERNELS
@torch.no_grad()
def test_float_outputs_are_those_of_the_simulation(quantized, cpu_backend, assert_backends_agree, cases):
    for dtype in (torch.float32, torch.bfloat16):
        tools = quantized, cpu_backend, assert_backends_agree, cases
        ran = agree(*tools, lambda layer, x, dtype=dtype: layer.to_float(layer.quantize(x), dtype))
        assert ran >= 3 * len(cases) // 5 - 1  # at least those of 3 and 4 bits


@HAS_KERNELS
@torch.no_grad()
def test_patches_make_the_outputs_of_a_convolution(quantized, cpu_backend, assert_backends_agree, cases, monkeypatch):
    """All stripes at once, and a row at a time; convolutions of other strides and groups go their own way."""
    monkeypatch.setattr(onednn, "MANY", 0)
    convolutions = [case for case in cases if isinstance(case[1], nn.Conv2d)]
    taken = []
    made = onednn._takes_patches
    monkeypatch.setattr(onednn, "_takes_patches", lambda spec: taken.append(made(spec)) or taken[-1])
    for stripe in (onednn.STRIPE, 1):
        monkeypatch.setattr(onednn, "STRIPE", stripe)
        for dtype in (torch.float32, torch.bfloat16):
            tools = quantized, cpu_backend, assert_backends_agree, convolutions
            assert agree(*tools, lambda layer, x, dtype=dtype: layer.to_float(layer.quantize(x), dtype))
    assert any(taken) and not all(taken)


@HAS_KERNELS
@torch.no_grad()
def test_codes_are_those_of_the_simulation(quantized, cpu_backend, assert_backends_agree, cases):
    for params in (
        BYTES,
        QuantParams(delta=0.3, zero_point=5, high=15),
        QuantParams(delta=0.02, zero_point=-9, high=255),
    ):
        tools = quantized, cpu_backend, lambda *given: assert_codes_agree(assert_backends_agree, *given), cases
        assert agree(*tools, lambda layer, x, params=params: layer.to_codes(layer.quantize(x), params))


def assert_codes_agree(assert_backends_agree, actual, expected, case):
    """Codes are equal where the float outputs before them are."""
    if onednn.step_order(torch.float32) is not None and "of groups" not in case:
        assert torch.equal(actual, expected), case
    else:
        assert (actual.int() - expected.int()).abs().max() <= 1, case


@HAS_KERNELS
def test_the_order_of_the_steps_is_known_on_x86():
    if not cpu.isa():
        pytest.skip("no x86 CPU with AVX2")
    for dtype in (torch.float32, torch.bfloat16):
        assert onednn.step_order(dtype) is not None, f"{cpu.isa()}, {dtype}: add its formula to step_order"


@HAS_KERNELS
def test_sums_are_exact_up_to_the_weights_that_it_says():
    assert onednn.largest_exact_weight() == (128 if cpu.isa() in VNNI or not cpu.isa() else 64)
    for weight in (onednn.largest_exact_weight() - 1, -onednn.largest_exact_weight()):
        for kernel in ((), (1, 1), (3, 3)):
            spec = LayerSpec(
                weight=torch.full((48, 96, *kernel), weight, dtype=torch.int8),
                step=torch.ones(48),
                bias=None,
                params=QuantParams(delta=1.0, zero_point=3, high=255),
                options={"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} if kernel else None,
            )
            codes = torch.full((2, 96, 5, 5) if kernel else (2, 96), 255, dtype=torch.uint8)
            exact = 252.0 * weight * spec.weight[0].numel()
            assert (OneDNNLayer(spec).to_float(codes, torch.float32) == exact).all(), (weight, kernel)


def test_weights_that_would_overflow_are_simulated():
    for weight, kind in ((64, OneDNNLayer), (-64, OneDNNLayer), (65, SimulatedLayer), (-128, SimulatedLayer)):
        matrix = torch.zeros(8, 16, dtype=torch.int8)
        matrix[3, 5] = weight
        spec = LayerSpec(weight=matrix, step=torch.ones(8), bias=None, params=BYTES)
        if kind is SimulatedLayer or onednn.largest_exact_weight():
            assert type(small_weight_layer(spec)) is kind, weight


@HAS_KERNELS
def test_layers_cannot_be_saved_copied_or_moved(quantized):
    lowered = integer_layer(quantized(nn.Linear(32, 16), torch.randn(2, 32)), OneDNNLayer)
    for attempt in (
        lowered.state_dict,
        lambda: lowered.load_state_dict({}),
        lambda: copy.deepcopy(lowered),
        lambda: lowered.to("meta"),
    ):
        with pytest.raises(NotImplementedError, match="lowered"):
            attempt()
