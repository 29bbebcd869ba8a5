"""A lowered model: what it computes, what it keeps, what it refuses."""

import gc
import weakref

import pytest
import torch
from torch import nn

import tomesd
from qdiff import QuantConfig, save_cali_ckpt
from qdiff.checkpoint import quantized_bytes
from qdiff.engine import attention, cpu, native, step_cache
from qdiff.engine.attention import LoweredCrossAttention
from qdiff.engine.backends import onednn
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.blocks import LoweredResBlock, LoweredUNet
from qdiff.engine.layers import IntegerLayer
from qdiff.engine.lower import backend_for, lower, small_weight_layer
from qdiff.exchange import Exchanged
from qdiff.quant_layer import QuantModule
from qdiff.quantizers import DynamicQuantizer

CPU = torch.device("cpu")
# For CPUs on which the order of oneDNN's last products is not known. With the wrong order the golden UNet's outputs
# were those of the simulation up to a PSNR of 160 to 166 dB where no code tipped over, and of 44.5 dB where some did
# (three inputs, float32 and bfloat16).
LEAST_PSNR = 35
# Inputs of more than 8 bits, in each place where codes are made and read.
MIXED = {
    "mixed_act": {
        f"model.{name}.act_quantizer": bits
        for name, bits in {
            "input_blocks.0.0": 16,
            "middle_block.0.in_layers.2": 12,
            "middle_block.0.out_layers.3": 12,
            "middle_block.0.emb_layers.1": 12,
            "middle_block.1.proj_in": 12,
            "middle_block.1.proj_out": 12,
            "middle_block.1.transformer_blocks.0.attn1.to_k": 12,
            "middle_block.1.transformer_blocks.0.attn1.to_out.0": 12,
            "middle_block.1.transformer_blocks.0.attn2.to_v": 12,
            "middle_block.1.transformer_blocks.0.ff.net.0.proj": 9,
            "middle_block.1.transformer_blocks.0.ff.net.2": 12,
            "out.2": 12,
        }.items()
    }
}
DYNAMIC = {"act_range": "dynamic"}


@pytest.fixture
def make_calibrated(make_qnn, golden):
    """(**settings) -> the golden UNet with ranges for its inputs, all quantizers on."""
    x, t, context = (golden[f"in_B1/{name}"] for name in ("x", "t", "context"))

    def make(**settings):
        qnn = make_qnn(**settings)
        qnn.requires_grad_(False)
        qnn.fit_weights()
        if qnn.config.quant_act:
            for quantizer in qnn.act_quantizers().values():
                if not isinstance(quantizer, DynamicQuantizer):
                    low, high = (0.0, 1.0) if quantizer.always_zero else (-5.0, 6.0)
                    quantizer.set_range(torch.tensor(low), torch.tensor(high))
        qnn.set_quant_state(True, qnn.config.quant_act)
        return qnn

    return make, (x, t, context)


@pytest.fixture
def lowered(make_calibrated):
    """(backend, blocks, **settings) -> a lowered model, and inputs."""
    make, inputs = make_calibrated

    def build(backend, *, blocks=True, **settings):
        qnn = make(**settings)
        lower(qnn, backend, blocks=blocks)
        return qnn, inputs

    return build


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "has_attention", lambda: False)


@pytest.fixture
def odd(make_calibrated):
    """Inputs of an odd batch and of odd sizes."""
    _, (x, t, context) = make_calibrated
    latents = torch.randn(3, x.shape[1], 10, 14, generator=torch.Generator().manual_seed(0))
    return latents, t[:1].expand(3), context[:1].expand(3, -1, -1)


def bfloat16(qnn, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return qnn(*inputs)


def psnr(actual, expected):
    """Return the peak signal-to-noise ratio in dB; the peak is the range of the expected values."""
    error = (actual - expected).double().pow(2).mean()
    return float("inf") if error == 0 else (20 * (expected.max() - expected.min()).log10() - 10 * error.log10()).item()


def assert_same(actual, expected, case):
    assert torch.isfinite(expected).all() and expected.std() > 0, case
    if onednn.step_order(torch.float32) is not None:
        assert torch.equal(actual, expected), f"{case}: PSNR {psnr(actual, expected):.1f} dB"
    else:
        assert psnr(actual, expected) > LEAST_PSNR, case


# --- what it computes --------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_backends_and_simulation_agree(lowered, cpu_backend):
    one_by_one = ({}, {"split": False}, {"weight_bit": 8}, {"sm_abit": 8}, {"act_symmetric": True}, MIXED)
    for settings in (*one_by_one, DYNAMIC, DYNAMIC | MIXED | {"weight_bit": 8}, DYNAMIC | {"act_symmetric": True}):
        backend = cpu_backend(**settings)
        if backend is not None:
            simulated, inputs = lowered(SimulatedLayer, **settings)
            fast, _ = lowered(backend, **settings)
            assert_same(fast(*inputs), simulated(*inputs), settings)


@torch.no_grad()
def test_they_agree_with_merged_tokens_and_odd_sizes(lowered, cpu_backend, odd):
    backend = cpu_backend()
    if backend is None:
        return
    for settings in ({}, DYNAMIC):
        outputs = []
        for qnn, _ in (lowered(SimulatedLayer, **settings), lowered(backend, **settings)):
            tomesd.apply_patch(qnn, ratio=0.5)
            outputs.append(qnn(*odd))
        assert_same(outputs[1], outputs[0], f"{settings}, ratio 0.5")
        plain, _ = lowered(backend, **settings)
        assert not torch.equal(outputs[1], plain(*odd))


@pytest.mark.slow
@torch.no_grad()
def test_in_bfloat16_they_agree_too(lowered, cpu_backend, odd):
    for settings, ratio in (
        ({}, 0),
        ({"weight_bit": 8}, 0),
        ({"split": False}, 0.5),
        ({"sm_abit": 8}, 0.5),
        ({"act_bit": 6}, 0.5),
        (MIXED, 0.5),
        (DYNAMIC, 0),
        (DYNAMIC | MIXED, 0.5),
    ):
        backend = cpu_backend(**settings)
        if backend is None:
            continue
        outputs = []
        for each in (SimulatedLayer, backend):
            qnn, inputs = lowered(each, **settings)
            if ratio:
                tomesd.apply_patch(qnn, ratio=ratio)
            outputs.append(bfloat16(qnn, *(odd if ratio else inputs)))
        assert outputs[1].dtype == torch.float32
        assert_same(outputs[1], outputs[0], f"{settings}, ratio {ratio}")


@torch.no_grad()
def test_the_wrong_order_of_the_steps_is_seen_and_small(lowered, cpu_backend, monkeypatch):
    """The limit for CPUs whose order is not known."""
    backend = cpu_backend()
    if backend is None:
        return
    (qnn, inputs), (simulated, _) = lowered(backend), lowered(SimulatedLayer)
    other = {"one by one": "together"}.get(onednn.step_order(torch.float32), "one by one")
    monkeypatch.setattr(onednn, "step_order", lambda dtype: other)
    assert LEAST_PSNR < psnr(simulated(*inputs), qnn(*inputs)) < float("inf")


@torch.no_grad()
def test_blocks_with_merged_feed_forward_layers_agree(lowered, odd, without_kernels):
    """A merged feed-forward layer gets its residual unmerged. Without kernels, float32 blocks agree bit for bit."""
    latents, t, context = odd
    inputs = latents[:2], t[:2], context[:2]
    outputs = []
    for blocks in (False, True):
        qnn, _ = lowered(SimulatedLayer, blocks=blocks)
        tomesd.apply_patch(qnn, ratio=0.5, merge_crossattn=True, merge_mlp=True)
        outputs.append(qnn(*inputs))
        if blocks:
            outputs.append(bfloat16(qnn, *inputs))
            tomesd.remove_patch(qnn)
            assert not torch.equal(bfloat16(qnn, *inputs), outputs[-1])
    assert torch.equal(outputs[0], outputs[1])
    # In bfloat16 other tokens are matched, so that it is no closer; without the residual it would be 1 or more.
    assert 0 < (outputs[2] - outputs[1]).norm() < 0.5 * outputs[1].norm()


@torch.no_grad()
def test_bfloat16_is_float32_up_to_its_rounding(make_calibrated, lowered):
    """Few bits make much of small differences: as far off as the float model's bfloat16, times a few."""
    make, inputs = make_calibrated
    expected = make(act_bit=8, weight_bit=8)(*inputs)
    qnn, _ = lowered(SimulatedLayer, act_bit=8, weight_bit=8)
    assert (bfloat16(qnn, *inputs) - expected).norm() < 0.25 * expected.norm()


@torch.no_grad()
def test_without_a_compiler_it_works_too(lowered, request):
    """Results are those with kernels, up to rounding; in float32 they are those of the quantized blocks."""
    if native.library() is None:
        pytest.skip("there is none here: all other tests show it")
    ways = {str(settings): settings for settings in ({}, DYNAMIC, DYNAMIC | MIXED)}
    models = {name: lowered(SimulatedLayer, **settings) for name, settings in ways.items()}
    fused = {name: (qnn(*inputs), bfloat16(qnn, *inputs)) for name, (qnn, inputs) in models.items()}
    request.getfixturevalue("without_kernels")
    for name, (qnn, inputs) in models.items():
        plain = qnn(*inputs), bfloat16(qnn, *inputs)
        assert torch.equal(plain[0], lowered(SimulatedLayer, blocks=False, **ways[name])[0](*inputs)), name
        for with_kernels, without in zip(fused[name], plain, strict=True):  # a few codes tip over, and tip others
            assert 0 < (without - with_kernels).norm() < 0.25 * with_kernels.norm(), name


@torch.no_grad()
def test_a_lowered_model_is_the_quantized_one_up_to_rounding(make_calibrated, lowered):
    make, inputs = make_calibrated
    for settings in ({}, DYNAMIC):
        qnn, _ = lowered(SimulatedLayer, blocks=False, **settings)
        expected = make(**settings)(*inputs)
        assert (qnn(*inputs) - expected).norm() < 2e-2 * expected.norm()  # a few codes tip over, and tip others


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(lowered):
    for settings in ({}, DYNAMIC):
        qnn, (x, t, context) = lowered(SimulatedLayer, **settings)
        both = qnn(torch.cat([x, x.flip(0) * 3]), torch.cat([t, t]), torch.cat([context, context]))
        alone = qnn(x, t, context)
        assert (both[: len(x)] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_it_runs_in_inference_mode(lowered):
    qnn, inputs = lowered(SimulatedLayer)
    with torch.no_grad():
        expected = qnn(*inputs)
    with torch.inference_mode(), step_cache.walk(qnn, inputs[1].tolist()):
        for _ in range(2):
            assert torch.equal(qnn(*(value.clone() for value in inputs)), expected)
    with torch.no_grad(), step_cache.walk(qnn, inputs[1].tolist()):
        assert torch.equal(qnn(*inputs), expected)


@torch.no_grad()
def test_large_attention_is_fused(lowered, monkeypatch, without_kernels):
    qnn, inputs = lowered(SimulatedLayer)
    expected = qnn(*inputs)
    blocks = [module for module in qnn.modules() if isinstance(module, LoweredCrossAttention)]
    assert len(blocks) > 2
    monkeypatch.setattr(attention, "SMALL", 0)
    qkv = [torch.randn(2, 2, n, 8) for n in (9, 7, 7)]
    fused = blocks[0].attend(*qkv)
    blocks[0].act_quantizer_w.set_range(torch.tensor(0.0), torch.tensor(0.3))  # clips: not to be left out
    clipped = blocks[0].attend(*qkv)
    blocks[0].act_quantizer_w.set_range(torch.tensor(0.0), torch.tensor(1.0))
    monkeypatch.setattr(attention, "SMALL", 2**20)
    exact = blocks[0].attend(*qkv)
    assert 0 < (fused - exact).abs().max() < 1e-3  # the softmax of 16 bits is left out
    assert (clipped - exact).abs().max() > 1e-2
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    assert torch.equal(qnn(*inputs), expected)  # nothing here is large


@torch.no_grad()
@pytest.mark.skipif(not native.has_attention(), reason="this CPU has no integer attention")
def test_attention_in_float32_is_in_integers(lowered, monkeypatch):
    """With masks, and quantizers of the softmax of 8 bits, it is that of the simulation up to rounding."""
    for bits in (16, 8):
        qnn, _ = lowered(SimulatedLayer, sm_abit=bits)
        block = next(module for module in qnn.modules() if isinstance(module, LoweredCrossAttention))
        x = torch.randn(2, 12, block.to_q.weight.shape[1])
        for mask in (None, torch.rand(2, 12) < 0.7):
            with torch.profiler.profile() as profile:
                result = block(x, mask=mask)
            assert "dsdiff::attention" in {event.key for event in profile.key_averages()}
            with monkeypatch.context() as patch:
                patch.setattr(native, "has_attention", lambda: False)
                expected = block(x, mask=mask)
            assert result.dtype == torch.float32
            assert (result - expected).norm() < 0.03 * expected.norm(), (bits, mask)


# --- what it keeps -----------------------------------------------------------------------------------------


def test_all_layers_are_integer_and_no_float_weight_is_left(lowered):
    qnn, _ = lowered(SimulatedLayer)
    assert not any(isinstance(module, QuantModule) for module in qnn.modules())
    assert sum(isinstance(module, IntegerLayer) for module in qnn.modules()) > 50
    floats = sum(p.numel() for p in qnn.parameters()) + sum(b.numel() for b in qnn.buffers() if b.is_floating_point())
    integers = sum(b.numel() for b in qnn.buffers() if b.dtype == torch.int8)
    assert integers > 5 * floats


def test_float_weights_are_let_go(make_calibrated):
    make, _ = make_calibrated
    for blocks in (False, True):
        qnn = make()
        weights = [weakref.ref(layer.weight) for layer in qnn.layers().values()]
        lower(qnn, SimulatedLayer, blocks=blocks)
        gc.collect()
        assert not [weight for weight in weights if weight() is not None], blocks
        with pytest.raises(ValueError, match="float weights are gone"):
            qnn.restore()
        with pytest.raises(ValueError, match="float weights are gone"):
            lower(qnn, SimulatedLayer)


def test_lowered_blocks_have_all_that_their_originals_had(make_calibrated):
    make, _ = make_calibrated
    qnn = make()
    before = {name: module for name, module in qnn.named_modules() if not isinstance(module, QuantModule)}
    plain = set(vars(nn.Module())) | {"_original", "_modules", "_parameters", "_buffers"}
    fields = {name: {k: v for k, v in vars(m).items() if k not in plain} for name, m in before.items()}
    children = {name: [child for child, _ in module.named_children()] for name, module in before.items()}
    lower(qnn, SimulatedLayer)
    exchanged = {name: module for name, module in qnn.named_modules() if isinstance(module, Exchanged)}
    assert {type(module).__name__ for module in exchanged.values()} >= {
        "LoweredUNet", "LoweredResBlock", "LoweredSpatialTransformer", "LoweredTransformerBlock",
        "LoweredCrossAttention", "LoweredFeedForward",
    }  # fmt: skip
    for name, module in exchanged.items():
        assert fields[name].items() <= vars(module).items(), name
        assert children[name] == [child for child, _ in module.named_children()], name


@torch.no_grad()
def test_within_a_walk_what_is_the_same_is_computed_once(lowered, without_kernels):
    qnn, (x, t, context) = lowered(SimulatedLayer)
    calls = []
    block = next(module for module in qnn.modules() if isinstance(module, LoweredResBlock))
    transformer = next(module for module in qnn.modules() if isinstance(module, LoweredCrossAttention))
    for layer in (qnn.model.time_embed, block.emb_layers.layer):
        layer.register_forward_hook(lambda *_: calls.append("time"))
    attn2 = next(module.attn2 for module in qnn.modules() if hasattr(module, "attn2"))
    attn2.to_k.layer.register_forward_hook(lambda *_: calls.append("context"))
    assert transformer is not attn2

    def count(time, context):
        before = len(calls)
        output = qnn(x, torch.full_like(t, time, dtype=torch.float32), context)
        return output, calls[before:]

    expected = {time: count(time, context)[0] for time in (7, 8.5, 9)}
    assert len(calls) == 9 and count(7, context)[1] == ["time", "time", "context"]
    with step_cache.walk(qnn, [7, 8.5]):
        for time, ran in ((7, {"time", "context"}), (7, set()), (8.5, {"time"}), (7, set()), (9, {"time"})):
            output, made = count(time, context)
            assert torch.equal(output, expected[time]) and set(made) == ran, time
        other = context.clone()
        assert torch.equal(count(7, other)[0], expected[7]) and count(7, other)[1] == []
    with step_cache.walk(qnn, [7, 8.5]):
        output, made = count(8.5, context)
        assert torch.equal(output, expected[8.5]) and made == ["context"]
        bfloat16(qnn, x, t * 0 + 7, context)  # floats and codes of a context are not mixed up
        assert torch.equal(count(7, context)[0], expected[7])
    with step_cache.walk(qnn, [7]):
        mixed = qnn(torch.cat([x, x]), torch.cat([t * 0 + 7, t * 0 + 9]), torch.cat([context, context]))
    assert torch.allclose(mixed, torch.cat([expected[7], expected[9]]), atol=1e-5)


# --- what it refuses ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_refuses_what_needs_its_weights(lowered, tmp_path):
    qnn, _ = lowered(SimulatedLayer)
    for attempt in (
        lambda: save_cali_ckpt(qnn, tmp_path / "x.safetensors"),
        lambda: quantized_bytes(qnn),
        lambda: qnn.set_quant_state(False, False),
        qnn.restore,
    ):
        with pytest.raises(ValueError, match="the model is lowered"):
            attempt()
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_cannot_be_lowered_stays_as_it_is(make_calibrated):
    make, inputs = make_calibrated

    def merge(qnn):
        tomesd.apply_patch(qnn, ratio=0.5)

    def last_layer_is_wide(qnn):
        list(qnn.layers().values())[-1].weight_quantizer.n_bits = 12

    for settings, change, says in (
        ({"quant_act": False}, None, "activations are float"),
        ({"weight_bit": 12}, None, "does not fit into bytes"),
        ({}, last_layer_is_wide, "out.2: W12A8 does not fit into bytes"),
        ({}, merge, "merge tokens last"),
    ):
        qnn = make(**settings)
        if change is not None:
            change(qnn)
        before = dict(qnn.named_modules()), qnn(*inputs)
        with pytest.raises(ValueError, match=says):
            lower(qnn, SimulatedLayer)
        assert dict(qnn.named_modules()) == before[0], says
        if change is not merge:  # which draws at each call
            assert torch.equal(qnn(*inputs), before[1]), says


def test_backends_are_chosen_by_bits_and_device(monkeypatch):
    for config, device, says in (
        (QuantConfig(quant_act=False), CPU, "activations are float"),
        (QuantConfig(act_bit=16), CPU, "W4A16 does not fit"),
        (QuantConfig(), torch.device("meta"), "no kernels for meta"),
    ):
        with pytest.raises(ValueError, match=says):
            backend_for(config, device)
    for largest, bits, expected in (
        (128, 8, OneDNNLayer),
        (128, 4, OneDNNLayer),
        (64, 6, small_weight_layer),
        (64, 7, "weights of 7 bits: .* no VNNI"),
        (64, 8, "weights of 8 bits: .* no VNNI"),
        (0, 4, "no exact integer kernels"),
    ):
        monkeypatch.setattr(onednn, "largest_exact_weight", lambda largest=largest: largest)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                backend_for(QuantConfig(weight_bit=bits), CPU)
        else:
            assert backend_for(QuantConfig(weight_bit=bits), CPU) is expected, (largest, bits)


def test_this_cpu_refuses_only_what_overflows_on_it(cpu_backend):
    assert (cpu_backend(weight_bit=4) is None) == (onednn.largest_exact_weight() == 0)
    if cpu.isa() in ("AVX2", "AVX512_CORE"):
        assert cpu_backend(weight_bit=8) is None
    elif cpu.isa():
        assert cpu_backend(weight_bit=8) is OneDNNLayer


@torch.no_grad()
def test_moving_the_model_drops_what_it_keeps(lowered):
    qnn, (x, t, context) = lowered(SimulatedLayer)
    assert isinstance(qnn.model, LoweredUNet)
    calls = []
    qnn.model.time_embed.register_forward_hook(lambda *_: calls.append(1))
    with step_cache.walk(qnn, [7]):
        expected = qnn(x, t * 0 + 7, context)
        qnn.to("cpu")
        assert torch.equal(qnn(x, t * 0 + 7, context), expected) and len(calls) == 2
