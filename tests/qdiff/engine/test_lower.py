"""A packed model: what it computes, what it keeps, what it refuses."""

import pytest
import torch

import tomesd
from qdiff import QuantConfig, save_cali_ckpt
from qdiff.checkpoint import unet_bytes
from qdiff.engine import attention, native
from qdiff.engine.attention import OncePerContext, PackedCrossAttention
from qdiff.engine.backends import onednn
from qdiff.engine.backends.onednn import OneDNNLayer
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.blocks import STEPS_KEPT, OncePerStep
from qdiff.engine.layers import IntegerLayer
from qdiff.engine.lower import kernels_for, pack
from qdiff.quant_layer import QuantModule

has_kernels = pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")


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
                low, high = (0.0, 1.0) if quantizer.always_zero else (-5.0, 6.0)
                quantizer.set_range(torch.tensor(low), torch.tensor(high))
        qnn.set_quant_state(True, qnn.config.quant_act)
        return qnn

    return make, (x, t, context)


@pytest.fixture
def packed(make_calibrated):
    """(engine, **settings) -> a packed model, and inputs."""
    make, inputs = make_calibrated

    def build(engine, *, fast=True, **settings):
        qnn = make(**settings)
        pack(qnn, engine, fast=fast)
        return qnn, inputs

    return build


def test_all_layers_are_integer_and_no_float_weight_is_left(packed):
    qnn, _ = packed(ReferenceLayer)
    assert not any(isinstance(module, QuantModule) for module in qnn.modules())
    assert sum(isinstance(module, IntegerLayer) for module in qnn.modules()) > 50
    floats = sum(p.numel() for p in qnn.parameters()) + sum(b.numel() for b in qnn.buffers() if b.is_floating_point())
    integers = sum(b.numel() for b in qnn.buffers() if b.dtype == torch.int8)
    assert integers > 5 * floats


def test_float_weights_are_let_go(make_calibrated):
    import weakref

    make, _ = make_calibrated
    qnn = make()
    layer = next(iter(qnn.layers().values()))
    weight = weakref.ref(layer.weight)
    del layer
    pack(qnn, ReferenceLayer)
    assert weight() is None
    with pytest.raises(ValueError, match="float weights are gone"):
        qnn.restore()


@has_kernels
@pytest.mark.parametrize("settings", [{}, {"split": False}, {"weight_bit": 8}, {"sm_abit": 8}, {"act_symmetric": True}])
@torch.no_grad()
def test_kernels_and_simulation_agree_bit_for_bit(packed, settings):
    (simulated, inputs), (fast, _) = (
        packed(ReferenceLayer, fast=False, **settings),
        packed(OneDNNLayer, **settings),
    )
    expected = simulated(*inputs)
    assert torch.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(fast(*inputs), expected)


@has_kernels
@torch.no_grad()
def test_they_agree_with_merged_tokens_and_odd_sizes(packed):
    (simulated, (x, t, context)), (fast, _) = packed(ReferenceLayer, fast=False), packed(OneDNNLayer)
    x = torch.randn(3, x.shape[1], 10, 14, generator=torch.Generator().manual_seed(0))
    outputs = []
    for qnn in (simulated, fast):
        tomesd.apply_patch(qnn, ratio=0.5)
        outputs.append(qnn(x, t[:1].expand(3), context[:1].expand(3, -1, -1)))
    assert torch.equal(*outputs)
    plain, _ = packed(OneDNNLayer)
    assert not torch.equal(outputs[1], plain(x, t[:1].expand(3), context[:1].expand(3, -1, -1)))


def bfloat16(qnn, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return qnn(*inputs)


@has_kernels
@pytest.mark.parametrize("settings", [{}, {"split": False}, {"weight_bit": 8}, {"sm_abit": 8}, {"act_bit": 6}])
@pytest.mark.parametrize("ratio", [0, 0.5])
@torch.no_grad()
def test_in_bfloat16_they_agree_bit_for_bit_too(packed, settings, ratio):
    outputs = []
    for engine in (ReferenceLayer, OneDNNLayer):
        qnn, (x, t, context) = packed(engine, **settings)
        if ratio:
            tomesd.apply_patch(qnn, ratio=ratio)
        odd = torch.randn(3, x.shape[1], 10, 14, generator=torch.Generator().manual_seed(0))
        outputs.append(
            [bfloat16(qnn, x, t, context), bfloat16(qnn, odd, t[:1].expand(3), context[:1].expand(3, -1, -1))]
        )
    for reference, kernels in zip(*outputs, strict=True):
        assert kernels.dtype == torch.float32 and kernels.std() > 0
        assert torch.equal(reference, kernels)


@torch.no_grad()
def test_bfloat16_is_float32_up_to_its_rounding(make_calibrated, packed):
    """Few bits make much of small differences: as far off as the float model's bfloat16, times a few."""
    make, inputs = make_calibrated
    expected = make(act_bit=8, weight_bit=8)(*inputs)
    qnn, _ = packed(ReferenceLayer, act_bit=8, weight_bit=8)
    assert (bfloat16(qnn, *inputs) - expected).norm() < 0.25 * expected.norm()


@pytest.mark.skipif(not native.library(), reason="no C compiler here")
@torch.no_grad()
def test_without_a_compiler_it_works_too(packed, monkeypatch):
    qnn, inputs = packed(ReferenceLayer)
    exact, fused = qnn(*inputs), bfloat16(qnn, *inputs)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "has_attention", lambda: False)
    assert torch.equal(qnn(*inputs), exact)
    assert (bfloat16(qnn, *inputs) - fused).norm() < 0.25 * fused.norm()


@torch.no_grad()
def test_time_embeddings_are_computed_once_a_step(packed):
    qnn, (x, t, context) = packed(ReferenceLayer)
    calls = []
    qnn.model.time_embed.register_forward_hook(lambda *_: calls.append(1))
    block = next(module for module in qnn.modules() if isinstance(module, OncePerStep))
    block.layer.register_forward_hook(lambda *_: calls.append(1))
    first = qnn(x, t * 0 + 7, context)
    assert torch.equal(qnn(x, t * 0 + 7, context), first) and len(calls) == 2
    assert not torch.equal(qnn(x, t * 0 + 8, context), first) and len(calls) == 4
    assert torch.equal(qnn(x, t * 0 + 7, context), first) and len(calls) == 4
    both = [qnn(x, torch.full_like(t, n), context) for n in (7, 8)]
    mixed = qnn(torch.cat([x, x]), torch.cat([t * 0 + 7, t * 0 + 8]), torch.cat([context, context]))
    assert torch.allclose(mixed, torch.cat(both), atol=1e-5)
    for n in range(STEPS_KEPT + 5):
        qnn(x, torch.full_like(t, n), context)
    assert len(block._outputs) == STEPS_KEPT


@torch.no_grad()
def test_packed_model_is_the_simulation_up_to_rounding(make_calibrated, packed):
    make, inputs = make_calibrated
    qnn, _ = packed(ReferenceLayer, fast=False)
    expected = make()(*inputs)
    assert (qnn(*inputs) - expected).norm() < 2e-2 * expected.norm()  # a few codes tip over, and tip others


@torch.no_grad()
def test_packed_model_refuses_what_needs_its_weights(packed, tmp_path):
    qnn, _ = packed(ReferenceLayer)
    for attempt in (
        lambda: save_cali_ckpt(qnn, tmp_path / "x.safetensors"),
        lambda: unet_bytes(qnn),
        lambda: qnn.set_quant_state(False, False),
        qnn.restore,
    ):
        with pytest.raises(ValueError, match="the model is packed"):
            attempt()
    assert not list(tmp_path.iterdir())


@has_kernels
def test_packed_model_runs_in_inference_mode(packed):
    qnn, inputs = packed(OneDNNLayer)
    with torch.no_grad():
        expected = qnn(*inputs)
    with torch.inference_mode():
        assert torch.equal(qnn(*(value.clone() for value in inputs)), expected)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(packed):
    qnn, (x, t, context) = packed(ReferenceLayer)
    both = qnn(torch.cat([x, x.flip(0)]), torch.cat([t, t]), torch.cat([context, context]))
    alone = qnn(x, t, context)
    assert (both[: len(x)] - alone).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
def test_large_attention_is_fused(packed, monkeypatch):
    qnn, inputs = packed(ReferenceLayer)
    expected = qnn(*inputs)
    blocks = [module for module in qnn.modules() if isinstance(module, PackedCrossAttention)]
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
def test_keys_and_values_of_a_context_are_computed_once():
    calls = []

    class Layer(torch.nn.Module):
        def forward(self, context):
            calls.append(context)
            return context * 2

    once = OncePerContext(Layer())
    first, second = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    assert once(first) is once(first) and len(calls) == 1
    once(second)
    assert len(calls) == 2
    second += 1  # another content in the same place
    assert torch.equal(once(second), second * 2) and len(calls) == 3


def test_what_cannot_be_packed_stays_as_it_is(make_calibrated):
    make, _ = make_calibrated
    for settings, says in (
        ({"quant_act": False}, "activations are float"),
        ({"act_bit": 12}, "does not fit into bytes"),
    ):
        qnn = make(**settings)
        before = {name: type(module) for name, module in qnn.named_modules()}
        with pytest.raises(ValueError, match=says):
            pack(qnn, ReferenceLayer)
        assert {name: type(module) for name, module in qnn.named_modules()} == before


def test_kernels_are_chosen_by_bits_and_device(monkeypatch):
    cpu = torch.device("cpu")
    for config, says in (
        (QuantConfig(quant_act=False), "activations are float"),
        (QuantConfig(act_bit=16), "W4A16 does not fit"),
    ):
        with pytest.raises(ValueError, match=says):
            kernels_for(config, cpu)
    with pytest.raises(ValueError, match="no kernels for meta"):
        kernels_for(QuantConfig(), torch.device("meta"))
    monkeypatch.setattr(onednn, "works", lambda: False)
    with pytest.raises(ValueError, match="no exact integer kernels"):
        kernels_for(QuantConfig(), cpu)
    monkeypatch.setattr(onednn, "works", lambda: True)
    assert kernels_for(QuantConfig(), cpu) is OneDNNLayer
