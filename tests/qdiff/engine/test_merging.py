"""Merged tokens in a lowered model: against the quantized model, the simulation, and attention over all tokens."""

import pytest
import torch

import tomesd
from qdiff.engine import attention, fused_ops, native
from qdiff.engine.attention import LoweredCrossAttention
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.lower import lower
from qdiff.engine.matching import nearest

WAYS = (
    {"proportional": True},
    {"merge_kv": True},
    {"merge_kv": True, "proportional": True},
    {"merge_kv": True, "proportional": True, "ratio": 0.8, "sx": 3, "sy": 3, "max_downsample": 2},
)
WIDE = {
    f"model.middle_block.1.transformer_blocks.0.attn1.{name}.act_quantizer": 12 for name in ("to_q", "to_k", "to_v")
}


@pytest.fixture
def make(make_qnn, golden):
    """(backend or None, **settings) -> the golden UNet with ranges for its inputs, lowered if there is a backend."""

    def build(backend, **settings):
        qnn = make_qnn(**settings)
        qnn.requires_grad_(False)
        qnn.fit_weights()
        for quantizer in qnn.act_quantizers().values():
            low, high = (0.0, 1.0) if quantizer.always_zero else (-5.0, 6.0)
            quantizer.set_range(torch.tensor(low), torch.tensor(high))
        qnn.set_quant_state(True, True)
        if backend is not None:
            lower(qnn, backend)
        return qnn

    return build


@pytest.fixture
def inputs(golden):
    """Inputs whose tokens resemble each other in part."""
    t, context = golden["in_B1/t"], golden["in_B1/context"]
    x = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 2)
    return x.repeat_interleave(2, 3) + 0.1 * torch.randn(2, 4, 10, 14), t[:1].expand(2), context[:1].expand(2, -1, -1)


def outputs(qnn, inputs, **way):
    tomesd.apply_patch(qnn, use_rand=False, **way)
    try:
        return qnn(*inputs)
    finally:
        tomesd.remove_patch(qnn)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_a_lowered_layer_attends_as_the_quantized_one(make):
    """Over merged keys, with their sizes or without; inputs of more than 8 bits, too."""
    for settings in ({}, {"mixed_act": WIDE}):
        quantized, lowered = (
            make(backend, **settings).get_submodule("model.middle_block.1.transformer_blocks.0.attn1")
            for backend in (None, SimulatedLayer)
        )
        x = torch.randn(2, 36, quantized.to_out[0].weight.shape[0])
        matching = tomesd.merge.match_tokens(x, 6, 6, 2, 2, 22)
        few, sizes = matching.merge(x), matching.log_sizes
        for tokens, call in (
            (x, {"context": few}),
            (x, {"context": few, "mask": sizes}),
            (few, {"mask": sizes}),
        ):
            expected, actual = quantized(tokens, **call), lowered(tokens, **call)
            assert isinstance(lowered, LoweredCrossAttention)
            assert relative(actual, expected) < 0.015, (settings.keys(), call.keys())
            assert relative(lowered(tokens), expected) > 0.02, (settings.keys(), call.keys())


@torch.no_grad()
def test_backends_and_simulation_agree(make, inputs, cpu_backend, assert_backends_agree):
    backend = cpu_backend()
    if backend is None:
        return
    simulated, fast = make(SimulatedLayer), make(backend)
    for way in WAYS:
        assert_backends_agree(outputs(fast, inputs, **way), outputs(simulated, inputs, **way), way)


@torch.no_grad()
def test_queries_stay_whole_and_keys_are_merged(make, inputs, monkeypatch):
    """The kernel gets codes of all queries, codes of the merged keys, and the logarithms of their sizes."""
    if not native.has_attention():
        pytest.skip("this CPU has no integer attention")
    qnn, shapes, original = make(SimulatedLayer), [], fused_ops.attention

    def spy(codes, *args, mask=None, **kwargs):
        shapes.append((*(each.shape[1] for each in codes), None if mask is None else mask.dtype))
        return original(codes, *args, mask=mask, **kwargs)

    monkeypatch.setattr(attention.fused_ops, "attention", spy)
    outputs(qnn, inputs, merge_kv=True)
    assert (140, 70, 70, None) in shapes
    shapes.clear()
    outputs(qnn, inputs, merge_kv=True, proportional=True)
    assert (140, 70, 70, torch.float32) in shapes
    shapes.clear()
    outputs(qnn, inputs, proportional=True)
    assert (70, 70, 70, torch.float32) in shapes


@torch.no_grad()
def test_proportional_keys_give_attention_over_all_tokens(make):
    """A lowered layer over merged keys with sizes computes what it does over all tokens, each its merged key."""
    layer = make(SimulatedLayer).get_submodule("model.middle_block.1.transformer_blocks.0.attn1")
    x = torch.randn(2, 36, layer.to_out[0].bias.numel())
    matching = tomesd.merge.match_tokens(x, 6, 6, 2, 2, 22)
    few = matching.merge(x)
    for dtype in (torch.float32, torch.bfloat16):
        many = layer(x.to(dtype), context=matching.unmerge(few).to(dtype))
        actual = layer(x.to(dtype), context=few.to(dtype), mask=matching.log_sizes)
        without = layer(x.to(dtype), context=few.to(dtype))
        assert relative(actual.float(), many.float()) < 0.02 < relative(without.float(), many.float()), dtype


@torch.no_grad()
def test_steps_levels_and_kept_matchings_in_whole_numbers(make, inputs):
    """Tokens are compared in whole numbers; a kept matching is what a new one would be."""
    qnn = make(SimulatedLayer)
    options = {"use_rand": False, "nearest": nearest, "proportional": True, "merge_levels": "1:0.5,2:0.25"}
    found = []
    for every in (1, 3):
        tomesd.apply_patch(qnn, **options, merge_every=every, merge_schedule="linear:0.5:0.5")
        with tomesd.walk(qnn, 3):
            found.append([qnn(*inputs) for _ in range(3)])
        counts = {(count.tokens_in, count.tokens_processed) for count in tomesd.token_report(qnn)}
        assert (140, 70) in counts and (35, 27) in counts
        tomesd.remove_patch(qnn)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
