"""The golden UNet on a GPU: float, quantized, and lowered to every engine, against the same on the CPU."""

import pytest
import torch

import tomesd
from dsdiff.environment import precision_context
from qdiff import QuantConfig, QuantModel, load_cali_ckpt
from qdiff.engine import step_cache
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.lower import backend_for, lower
from qdiff.quantizers import DynamicQuantizer

CUDA = torch.device("cuda")
# Rounding differs in the last bits, and some codes tip over: without, the PSNR is 150 dB or more.
LEAST_PSNR = 30
HALF_PSNR = 25


@pytest.fixture
def inputs(golden):
    return tuple(golden[f"in_B1/{name}"] for name in ("x", "t", "context"))


@pytest.fixture
def make_calibrated(make_unet, golden_ckpt, inputs):
    """(device, **settings) -> the golden UNet, quantized as in its cali_ckpt; with settings, with simple ranges."""

    def make(device, **settings):
        if not settings:
            config = QuantConfig(weight_bit=4, act_bit=8, quant_act=True, split=True, sm_abit=16)
            qnn = QuantModel(make_unet().to(device), config)
            load_cali_ckpt(qnn, golden_ckpt)
            return qnn.requires_grad_(False)
        qnn = QuantModel(make_unet().to(device), QuantConfig(**settings)).requires_grad_(False)
        qnn.fit_weights()
        for quantizer in qnn.act_quantizers().values():
            if not isinstance(quantizer, DynamicQuantizer):
                low, high = (0.0, 1.0) if quantizer.always_zero else (-5.0, 6.0)
                quantizer.set_range(torch.tensor(low, device=device), torch.tensor(high, device=device))
        qnn.set_quant_state(True, True)
        return qnn

    return make


@torch.no_grad()
def output(network, inputs, device, dtype=None):
    """Return the network's output; dtype: of autocast, None for float32 without TF32."""
    on = torch.device(device)
    context = precision_context(on, "full") if dtype is None else torch.autocast(on.type, dtype)
    with context:
        return network(*(each.to(on) for each in inputs)).float().cpu()


def test_the_float_unet(make_unet, inputs, psnr):
    expected = output(make_unet(), inputs, "cpu")
    assert psnr(output(make_unet().to(CUDA), inputs, CUDA), expected) > 100
    for dtype, least in ((torch.bfloat16, 30), (torch.float16, 45)):
        assert psnr(output(make_unet().to(CUDA), inputs, CUDA, dtype), expected) > least, dtype


def test_the_quantized_unet_and_its_recorded_output(make_calibrated, inputs, golden, psnr):
    qnn = make_calibrated(CUDA)
    qnn.set_quant_state(True, True)
    found = output(qnn, inputs, CUDA)
    assert psnr(found, output(make_calibrated("cpu"), inputs, "cpu")) > LEAST_PSNR
    assert psnr(found, golden["resumed_qa1/B1"]) > LEAST_PSNR


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("backend", ["simulate", "int_mm", "chosen"])
def test_lowered_unets(make_calibrated, inputs, psnr, backend, blocks):
    expected = make_calibrated("cpu")
    lower(expected, SimulatedLayer, blocks=blocks)
    qnn = make_calibrated(CUDA)
    make = {"simulate": SimulatedLayer, "int_mm": int_matmul_layer}.get(backend) or backend_for(qnn.config, CUDA)
    lower(qnn, make, blocks=blocks)
    reference = output(expected, inputs, "cpu")
    assert psnr(output(qnn, inputs, CUDA), reference) > LEAST_PSNR
    for dtype in (torch.bfloat16, torch.float16):
        assert psnr(output(qnn, inputs, CUDA, dtype), reference) > HALF_PSNR, dtype


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bit": 8, "act_bit": 8, "quant_act": True},
        {"weight_bit": 4, "act_bit": 8, "quant_act": True, "act_range": "dynamic"},
        {"weight_bit": 3, "act_bit": 8, "quant_act": True, "sm_abit": 16},
        {
            "weight_bit": 4,
            "act_bit": 8,
            "quant_act": True,
            "mixed_act": {
                "model.input_blocks.0.0.act_quantizer": 16,
                "model.middle_block.1.transformer_blocks.0.ff.net.2.act_quantizer": 12,
                "model.out.2.act_quantizer": 12,
            },
        },
    ],
    ids=["w8a8", "dynamic", "w3", "wide"],
)
def test_other_quantizations(make_calibrated, inputs, psnr, settings):
    expected, qnn = make_calibrated("cpu", **settings), make_calibrated(CUDA, **settings)
    lower(expected, SimulatedLayer)
    lower(qnn, backend_for(qnn.config, CUDA))
    assert psnr(output(qnn, inputs, CUDA), output(expected, inputs, "cpu")) > LEAST_PSNR
    assert psnr(output(qnn, inputs, CUDA, torch.bfloat16), output(expected, inputs, "cpu")) > HALF_PSNR


def test_odd_batches_and_sizes(make_calibrated, inputs, psnr):
    x, t, context = inputs
    odd = torch.randn(3, x.shape[1], 10, 14, generator=torch.Generator().manual_seed(0))
    odd = (odd, t[:1].expand(3), context[:1].expand(3, -1, -1))
    expected, qnn = make_calibrated("cpu"), make_calibrated(CUDA)
    lower(expected, SimulatedLayer)
    lower(qnn, backend_for(qnn.config, CUDA))
    assert psnr(output(qnn, odd, CUDA), output(expected, odd, "cpu")) > LEAST_PSNR


def test_a_lowered_unet_keeps_results_within_a_walk(make_calibrated, inputs):
    qnn = make_calibrated(CUDA)
    lower(qnn, backend_for(qnn.config, CUDA))
    x, t, context = (each.to(CUDA) for each in inputs)
    with torch.no_grad(), step_cache.walk(qnn, [float(t[0])]):
        first = qnn(x, t, context)
        assert torch.equal(qnn(x, t, context), first)


@pytest.mark.parametrize("lowered", [False, True])
def test_merged_tokens(make_unet, make_calibrated, inputs, psnr, lowered):
    """The destinations are drawn on the CPU, so that both devices merge the same tokens."""
    found = []
    for device in ("cpu", CUDA):
        network = make_calibrated(device) if lowered else make_unet().to(device)
        if lowered:
            lower(network, SimulatedLayer if device == "cpu" else backend_for(network.config, CUDA))
        tomesd.apply_patch(network, ratio=0.5)
        found.append(output(network, inputs, device))
        tomesd.remove_patch(network)
        assert not torch.equal(output(network, inputs, device), found[-1])
    assert psnr(found[1], found[0]) > (20 if lowered else 60)
