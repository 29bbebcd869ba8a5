"""Quantized blocks: attention against a plain float64 one, and against recorded operands of the reference."""

import copy

import pytest
import torch
import torch.nn as nn

from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock
from qdiff import quant_block
from qdiff.config import QuantConfig
from qdiff.quant_block import (
    OPERANDS,
    BaseQuantBlock,
    QuantAttentionBlock,
    QuantBasicTransformerBlock,
    QuantCrossAttention,
    QuantResBlock,
)
from qdiff.quantizers import Quantizer

HEADS, DIM = 3, 4
BLOCKS = {
    "ResBlock": (lambda: ResBlock(32, 16, 0.0, out_channels=64), QuantResBlock),
    "BasicTransformerBlock": (
        lambda: BasicTransformerBlock(12, HEADS, DIM, context_dim=10),
        QuantBasicTransformerBlock,
    ),
    "CrossAttention": (lambda: CrossAttention(12, 10, HEADS, DIM), QuantCrossAttention),
    "AttentionBlock": (lambda: AttentionBlock(32, num_heads=2), QuantAttentionBlock),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(batch=2, n=5, m=7, seed=0):
    """q, k, v [batch, heads, tokens, dim]; scaled so that the softmax is far from uniform."""
    q, k, v = (random(batch, HEADS, count, DIM, seed=seed + i) for i, count in enumerate((n, m, m)))
    return 2 * q, 2 * k, v


def softmax_of(q, k, scale, mask=None):
    """In float64. mask: bool [B, M], False hides."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * scale
    if mask is not None:
        scores[~mask[:, None, None].expand(scores.shape)] = float("-inf")
    scores = (scores - scores.amax(-1, keepdim=True)).exp()
    return scores / scores.sum(-1, keepdim=True)


def quantized(x, quantizer):
    """x on the grid of a quantizer, in float64."""
    delta, zero_point = quantizer.delta.double(), quantizer.zero_point.double()
    codes = (x.double() / delta).round() + zero_point
    low = -(2 ** (quantizer.n_bits - 1)) if quantizer.symmetric else 0
    return (codes.clamp(low, low + 2**quantizer.n_bits - 1) - zero_point) * delta


def plain_attention(block, q, k, v, scale, mask=None):
    """What a quantized block's `attend` stands for, in float64."""
    q, k, v = (quantized(x, getattr(block, f"act_quantizer_{name}")) for name, x in zip("qkv", (q, k, v), strict=True))
    return quantized(softmax_of(q, k, scale, mask), block.act_quantizer_w) @ v


def fit(block, q, k, v, scale):
    for name, x in (("q", q), ("k", k), ("v", v), ("w", softmax_of(q, k, scale).float())):
        getattr(block, f"act_quantizer_{name}").fit(x)


def switch(block, on):
    for module in block.modules():
        if isinstance(module, Quantizer):
            module.enabled = on


def cross_attention(**settings):
    """Quantized, with ranges fitted to `operands()`."""
    torch.manual_seed(0)
    attention = QuantCrossAttention(CrossAttention(12, 10, HEADS, DIM), QuantConfig(**settings))
    if settings.get("quant_act", True):
        fit(attention, *operands(), attention.scale)
    return attention.eval()


@pytest.fixture
def seen_weights():
    """(block) -> a list to which each forward adds the shapes of the attention matrices it quantizes."""

    def watch(block):
        shapes = []
        block.act_quantizer_w.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
        return shapes

    return watch


# --- the attention product ---------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_on_quantized_operands(subtests):
    for settings in [
        {},
        {"act_bit": 4, "sm_abit": 8},
        {"act_symmetric": True},
        {"act_scale_method": "mse", "sm_abit": 8},
    ]:
        with subtests.test(settings=settings):
            attention, (q, k, v) = cross_attention(**settings), operands()
            expected = plain_attention(attention, q, k, v, attention.scale)
            torch.testing.assert_close(attention.attend(q, k, v).double(), expected, rtol=0, atol=1e-4)
            assert (expected - softmax_of(q, k, attention.scale) @ v.double()).abs().max() > 1e-3  # quantization tells


@torch.no_grad()
def test_whole_layer_on_quantized_operands():
    attention, x, context = cross_attention(), random(2, 5, 12), random(2, 7, 10, seed=1)
    q, k, v = (
        projected.unflatten(2, (HEADS, DIM)).transpose(1, 2)
        for projected in (attention.to_q(x), attention.to_k(context), attention.to_v(context))
    )
    fit(attention, q, k, v, DIM**-0.5)
    heads = plain_attention(attention, q, k, v, DIM**-0.5)
    expected = copy.deepcopy(attention.to_out).double()(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, context).double(), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_recorded_attention(make_qnn, golden, golden_tensors, assert_close):
    attention = make_qnn().get_submodule("model.input_blocks.1.1.transformer_blocks.0.attn1")
    prefix = "model.input_blocks.1.1.transformer_blocks.0.attn1"
    recorded = {name: golden[f"resumed_qa1/attn1_operands_B1/{name}"][None] for name in ("q_in", "k_in", "v_in")}
    for name in OPERANDS:
        quantizer = getattr(attention, name)
        quantizer.set(*(golden_tensors[f"{prefix}.{name}.{what}"] for what in ("delta", "zero_point")))
        quantizer.enabled = True
        before, after = (golden[f"resumed_qa1/attn1_operands_B1/{name[-1]}_{end}"] for end in ("in", "out"))
        assert torch.equal(quantizer(before), after)
    out = attention.attend(*recorded.values()).transpose(1, 2).flatten(2)
    assert_close(out, golden[f"resumed_qa1/teacher_B1/{prefix}.to_out.0/in0"])


@torch.no_grad()
def test_float_operands_are_attended_as_inherited(subtests):
    for masked in [False, True]:
        for case in ["switched off", "weights only"]:
            with subtests.test(masked=masked, case=case):
                attention = cross_attention(quant_act=case != "weights only")
                switch(attention, False)
                mask = torch.arange(7) < torch.tensor([[4], [7]])
                arguments = (*operands(), mask[:, None, None] if masked else None)
                assert torch.equal(attention.attend(*arguments), CrossAttention.attend(attention, *arguments))


@torch.no_grad()
def test_switched_off_block_is_the_float_block():
    attention = cross_attention()
    switch(attention, False)
    float_attention = attention.original
    x, context = random(2, 5, 12), random(2, 7, 10, seed=1)
    assert type(float_attention) is CrossAttention
    assert torch.equal(attention(x, context), float_attention(x, context))


# --- masks -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mask_of_quantized_attention():
    attention, (q, k, v) = cross_attention(), operands()
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()
    actual = attention.attend(q, k, v, mask[:, None, None])
    torch.testing.assert_close(
        actual.double(), plain_attention(attention, q, k, v, attention.scale, mask), rtol=0, atol=1e-4
    )
    for i in range(2):  # as if the hidden keys were not there
        kept = attention.attend(q[i : i + 1], k[i : i + 1, :, mask[i]], v[i : i + 1, :, mask[i]])
        torch.testing.assert_close(actual[i : i + 1], kept, rtol=0, atol=1e-4)


@torch.no_grad()
def test_hidden_values_do_not_leak():
    """The quantized softmax keeps 0 exactly."""
    attention, (q, k, v) = cross_attention(), operands()
    mask = (torch.arange(7) < 4).expand(2, 1, 1, 7)
    out = attention.attend(q, k, v, mask)
    v[:, :, 4:] = v.flip(2)[:, :, 4:] * 0.5
    assert torch.equal(attention.attend(q, k, v, mask), out)


@torch.no_grad()
def test_mask_of_the_whole_layer():
    attention, x, context = cross_attention(), random(2, 5, 12), random(2, 7, 10, seed=1)
    mask = torch.arange(7).expand(2, 7) < 4
    shortened = attention(x, context[:, :4])
    torch.testing.assert_close(attention(x, context, mask), shortened, rtol=0, atol=1e-4)
    assert (attention(x, context) - shortened).abs().max() > 1e-2


# --- some heads at a time ----------------------------------------------------------------------------------


@torch.no_grad()
def test_heads_at_a_time_make_no_difference(monkeypatch, seen_weights, subtests):
    for masked in [False, True]:
        for limit, heads in [(1, [1] * 6), (5 * 7 * 4, [4, 2]), (5 * 7 * 6, [6])]:
            with subtests.test(masked=masked, limit=limit, heads=heads):
                attention, (q, k, v) = cross_attention(), operands()
                hidden = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()
                mask = hidden[:, None, None] if masked else None
                whole = attention.attend(q, k, v, mask)
                shapes = seen_weights(attention)
                with monkeypatch.context() as patch:
                    patch.setattr(quant_block, "MAX_SCORES", limit)
                    assert torch.equal(attention.attend(q, k, v, mask), whole)
                assert shapes == [(count, 5, 7) for count in heads]


@torch.no_grad()
def test_small_attention_is_done_at_once(seen_weights):
    attention = cross_attention()
    shapes = seen_weights(attention)
    attention.attend(*operands())
    assert shapes == [(2 * HEADS, 5, 7)]


# --- its quantizers ----------------------------------------------------------------------------------------


def test_settings_reach_the_operands(subtests):
    for act_symmetric in [False, True]:
        with subtests.test(act_symmetric=act_symmetric):
            config = QuantConfig(act_bit=5, sm_abit=7, act_symmetric=act_symmetric, act_scale_method="mse")
            attention = QuantCrossAttention(CrossAttention(12, 10, HEADS, DIM), config)
            for name in OPERANDS:
                quantizer, softmax = getattr(attention, name), name == "act_quantizer_w"
                assert quantizer.n_bits == (7 if softmax else 5)
                assert quantizer.symmetric is (act_symmetric and not softmax)
                assert quantizer.always_zero is softmax
                assert not quantizer.channel_wise and quantizer.scale_method == "mse"


def test_softmax_is_quantized_from_zero():
    attention = cross_attention(sm_abit=8)
    q, k, _ = operands()
    assert attention.act_quantizer_w.zero_point == 0
    expected = softmax_of(q, k, attention.scale).max() / 255
    assert attention.act_quantizer_w.delta.item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_half_precision_operands(subtests):
    for dtype in [torch.float16, torch.bfloat16]:
        with subtests.test(dtype=dtype):
            attention, (q, k, v) = cross_attention(), (x.to(dtype) for x in operands())
            out = attention.attend(q, k, v)
            assert out.dtype == dtype
            expected = plain_attention(attention, q, k, v, attention.scale)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-3 if dtype == torch.float16 else 4e-2)


# --- AttentionBlock ----------------------------------------------------------------------------------------


def attention_block(new_order):
    torch.manual_seed(0)
    block = AttentionBlock(32, num_heads=2, use_new_attention_order=new_order).eval()
    nn.init.normal_(block.proj_out.weight, std=0.2)  # zero by default
    nn.init.normal_(block.qkv.weight, std=0.3)
    return block


def qkv_of(block, x, new_order):
    """By slicing: rows of all q, all k, all v (new), or q, k, v of each head in turn."""
    rows = block.qkv(block.norm(x.flatten(2)))
    if new_order:
        parts = [[rows[:, 32 * part + 16 * head :][:, :16] for head in range(2)] for part in range(3)]
    else:
        parts = [[rows[:, 48 * head + 16 * part :][:, :16] for head in range(2)] for part in range(3)]
    return [torch.stack(heads, 1).transpose(2, 3) for heads in parts]


@torch.no_grad()
def test_attention_block_on_quantized_operands(subtests):
    for new_order in [False, True]:
        with subtests.test(new_order=new_order):
            block, x = attention_block(new_order), random(2, 32, 3, 4)
            q, k, v = qkv_of(block, x, new_order)
            before = block(x)
            block = QuantAttentionBlock(block, QuantConfig())
            fit(block, q, k, v, 16**-0.5)
            heads = plain_attention(block, q, k, v, 16**-0.5)
            tokens = heads.transpose(2, 3).flatten(1, 2)
            expected = copy.deepcopy(block.proj_out).double()(tokens).reshape(x.shape) + x.double()
            # A code of the softmax, 16 bits wide, may tip over with the order of a sum.
            torch.testing.assert_close(block(x).double(), expected, rtol=0, atol=1e-4)
            assert (expected - before.double()).abs().max() > 1e-3
            switch(block, False)
            assert torch.equal(block(x), before)


@torch.no_grad()
def test_attention_block_with_one_head_at_a_time(monkeypatch, seen_weights):
    block, x = attention_block(True), random(2, 32, 3, 4)
    block = QuantAttentionBlock(block, QuantConfig())
    fit(block, *qkv_of(block, x, True), 16**-0.5)
    whole = block(x)
    shapes = seen_weights(block)
    monkeypatch.setattr(quant_block, "MAX_SCORES", 1)
    assert torch.equal(block(x), whole)
    assert shapes == [(1, 12, 12)] * 4


# --- built from a float block ------------------------------------------------------------------------------


def test_a_quantized_block_is_built_from_a_float_one():
    for name, (make, quantized_kind) in BLOCKS.items():
        for quant_act in (False, True):
            block = make().eval()
            made = quantized_kind(block, QuantConfig(quant_act=quant_act))
            assert isinstance(made, type(block)), name
            assert isinstance(made, BaseQuantBlock) is (name != "CrossAttention"), name
            assert made.original is block and not made.training, name
            assert list(made.state_dict())[: len(block.state_dict())] == list(block.state_dict()), name
            fields = {key: value for key, value in vars(block).items() if not key.startswith("_")}
            assert {key: getattr(made, key) for key in fields} == fields, name


def test_what_a_block_computes_is_inherited():
    for name, (make, quantized_kind) in BLOCKS.items():
        for method in ("forward", "_forward"):
            inherited = getattr(type(make()), method, None)
            assert getattr(quantized_kind, method, None) is inherited, name


def test_gradients_do_not_depend_on_the_parts(monkeypatch):
    block = QuantCrossAttention(CrossAttention(16, heads=2, dim_head=8), QuantConfig())
    for name in ("q", "k", "v", "w"):
        quantizer = block.get_submodule(f"act_quantizer_{name}")
        quantizer.set(torch.tensor(1 / 255 if name == "w" else 0.05), torch.tensor(0.0 if name == "w" else 128.0))
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for scores in (2**25, 1):
        monkeypatch.setattr("qdiff.quant_block.MAX_SCORES", scores)
        delta = torch.tensor(1 / 255, requires_grad=True)
        block.act_quantizer_w.delta = delta
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        block.attend(*inputs).square().sum().backward()
        gradients.append([x.grad for x in (*inputs, delta)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # of delta, a sum of terms that nearly cancel
        assert one.abs().sum() > 0
