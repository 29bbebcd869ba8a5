"""Operations and layers whose codes have ranges taken from the numbers themselves, by our kernels and by PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.low_rank import LowRankBranch
from qdiff.engine import dynamic_layer, fused_ops
from qdiff.engine.backends import onednn
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import integer_layer
from qdiff.engine.lora import branched
from qdiff.engine.quant_params import DynamicParams, QuantParams
from qdiff.quantizers import DynamicQuantizer

STATIC = QuantParams(delta=0.031, zero_point=113, high=255)


def params_for(per, bits=8, symmetric=False, padding=()):
    return DynamicParams(high=2**bits - 1, symmetric=symmetric, per=per, padding=padding)


def reference(x, params):
    """What the simulation's quantizer makes of x."""
    bits = (params.high + 1).bit_length() - 1
    return DynamicQuantizer(bits, params.symmetric, per=params.per)(x.float())


def assert_steps(codes, expected, most=1.01, share=0.02):
    """Values are the expected ones, but for some that are a step away."""
    difference = (codes.values(torch.float32) - expected.float()).abs()
    steps, _ = codes.columns(difference.ndim)
    assert (difference <= most * steps + 1e-6).all()
    assert (difference > 0.5 * steps).double().mean() <= share


def test_codes_stand_for_what_the_quantizer_says_bit_for_bit(way, channels_last):
    for dtype in (torch.float32, torch.bfloat16):
        tokens = {
            "tokens": torch.randn(3, 5, 700).to(dtype),
            "strided": torch.randn(2, 3, 8, 5).to(dtype)[..., ::2],
            "one row": torch.randn(9).to(dtype),
            "of one sign": torch.rand(2, 6).to(dtype) + 3,
            "zeros": torch.zeros(2, 6).to(dtype),
            "nothing": torch.zeros(0, 4).to(dtype),
        }
        samples = {
            "feature map": channels_last(2, 33, 5, 7, dtype=dtype),
            "its last channels": channels_last(2, 64, 4, 4, dtype=dtype)[:, 24:],
            "channels first": torch.randn(2, 6, 4, 4).to(dtype),
            "one dimension": torch.randn(2, 6, 4).to(dtype),
        }
        for per, inputs in (("token", tokens), ("sample", samples)):
            for name, x in inputs.items():
                for bits, symmetric in ((8, False), (8, True), (12, False), (12, True), (4, False)):
                    (codes,) = fused_ops.quantize(x, params_for(per, bits, symmetric))
                    case = f"{name}, {dtype}, {bits} bits, {symmetric}"
                    assert codes.codes.dtype == torch.uint8, case
                    assert torch.equal(codes.values(torch.float32), reference(x, codes.params)), case


def test_a_border_stands_for_0(way, channels_last):
    for bits in (8, 12):
        x, padding = channels_last(2, 3, 4, 5), (1, 2)
        (codes,) = fused_ops.quantize(x, params_for("sample", bits, padding=padding))
        (plain,) = fused_ops.quantize(x, params_for("sample", bits))
        assert torch.equal(codes.values(torch.float32), plain.values(torch.float32))
        planes = codes.codes.int() if bits == 8 else codes.codes[0].int() + 256 * codes.codes[1].int()
        assert planes.shape == (2, 3, 6, 9)
        border = torch.ones(6, 9, dtype=torch.bool)
        border[1:5, 2:7] = False
        for i in range(2):
            assert (planes[i][:, border] == codes.ranges[i, 1]).all()


def test_equal_quantizers_share_codes_and_others_do_not(way):
    narrow, wide = params_for("token"), params_for("token", 12)
    codes = fused_ops.quantize(torch.randn(2, 5), narrow, wide, narrow, STATIC)
    assert codes[0] is codes[2] and codes[1].codes.shape == (2, 2, 5) and isinstance(codes[3], torch.Tensor)


@torch.no_grad()
def test_group_norm(way, channels_last):
    for shape, groups in (((2, 64, 6, 5), 8), ((1, 640, 17, 16), 32), ((3, 8, 1, 1), 2)):
        norm = nn.GroupNorm(groups, shape[1], eps=1e-5)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        x, added = channels_last(*shape, dtype=torch.float32), torch.randn(shape[:2])
        for more, silu in ((None, False), (None, True), (added, False), (added, True)):
            if silu and shape[2:] == (1, 1):
                continue  # SiLU's least value ends the kernel's range, also where few numbers come close to it
            for bits in (8, 12):
                codes = fused_ops.group_norm(norm, x, params_for("sample", bits, padding=(1, 1)), added=more, silu=silu)
                y = norm(x if more is None else x + more[:, :, None, None])
                y = F.silu(y) if silu else y
                assert_steps(codes, reference(y, codes.params), share=0.02 if bits == 8 else 0.1)


@torch.no_grad()
def test_geglu(way):
    x = torch.randn(3, 11, 2 * 700).mul_(3)
    value, gate = x.chunk(2, dim=-1)
    for bits in (8, 12):
        codes = fused_ops.geglu(x, params_for("token", bits))
        assert_steps(codes, reference(value * F.gelu(gate), codes.params), share=0.02 if bits == 8 else 0.1)


def test_attention(way):
    ranges = tuple(QuantParams(delta=0.02 + i / 100, zero_point=120 + i, high=255) for i in range(3))
    codes = tuple(torch.randint(0, 256, (2, n, 4 * 24)).byte() for n in (70, 33, 33))
    q, k, v = (
        ((c.float() - r.zero_point) * r.delta).unflatten(-1, (4, -1)).transpose(1, 2)
        for c, r in zip(codes, ranges, strict=True)
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    for bits in (8, 12):
        out = fused_ops.attention(codes, ranges, 4, params_for("token", bits), torch.float32)
        assert (out.values(torch.float32) - expected).norm() < 0.01 * expected.norm()


# --- layers ------------------------------------------------------------------------------------------------


def cases():
    """Each layer, with an input whose tokens or samples differ a hundredfold."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 100.0])
    for name, layer, x, split in (
        ("linear", nn.Linear(37, 19), torch.randn(2, 6, 37, generator=generator) * sizes[:, None, None], 0),
        ("convolution", nn.Conv2d(9, 7, 3, padding=1), torch.randn(2, 9, 5, 6, generator=generator), 0),
        ("of stride 2", nn.Conv2d(9, 7, 3, stride=2, padding=(1, 0)), torch.randn(2, 9, 8, 6, generator=generator), 0),
        ("pointwise", nn.Conv2d(9, 7, 1), torch.randn(2, 9, 5, 6, generator=generator), 0),
        ("split", nn.Conv2d(12, 7, 1, bias=False), torch.randn(2, 12, 5, 6, generator=generator), 5),
        ("one dimension", nn.Conv1d(9, 7, 3, padding=1), torch.randn(2, 9, 6, generator=generator), 0),
    ):
        yield name, layer, x * sizes.view(-1, *[1] * (x.ndim - 1)), split


@torch.no_grad()
def test_a_layer_computes_what_the_simulation_does(way, quantized):
    for make in (SimulatedLayer, int_matmul_layer):
        for settings in ({}, {"weight_bit": 8}, {"act_symmetric": True}, {"act_bit": 12}, {"act_bit": 5}):
            if make is int_matmul_layer and "weight_bit" in settings and onednn.largest_exact_weight() < onednn.LARGEST:
                continue  # PyTorch multiplies by oneDNN as well, whose sums are not exact here
            for name, layer, x, split in cases():
                module = quantized(layer, x, split, act_range="dynamic", **settings)
                lowered, expected = integer_layer(module, make), module(x)
                for actual, of in zip(lowered(x), expected, strict=True):
                    assert (actual - of).abs().max() <= 2e-5 * of.abs().max(), (name, settings)


@torch.no_grad()
def test_it_does_not_matter_how_many_tokens_or_pixels_are_computed_together(way, quantized, monkeypatch):
    for name, layer, x, split in cases():
        for bits in (8, 12):
            lowered = integer_layer(quantized(layer, x, split, act_range="dynamic", act_bit=bits), SimulatedLayer)
            whole = lowered(x)
            with monkeypatch.context() as patch:
                patch.setattr(dynamic_layer, "PRODUCTS", 40)
                assert torch.equal(lowered(x), whole), name


@torch.no_grad()
def test_codes_of_the_output_and_sums_with_others(way, quantized):
    for name, layer, x, split in cases():
        if split or name == "one dimension":
            continue
        lowered = integer_layer(quantized(layer, x, act_range="dynamic"), SimulatedLayer)
        codes, output = lowered.quantize(x), lowered(x)
        expected = (output / STATIC.delta).round().add(STATIC.zero_point).clamp(0, 255)
        assert (lowered.to_codes(codes, STATIC).float() - expected).abs().max() <= 1, name
        addend = torch.randn_like(output)
        torch.testing.assert_close(lowered.plus(codes, addend), output + addend)
        if output.ndim == 3:
            assert lowered.plus(codes, addend, out=addend) is addend


@torch.no_grad()
def test_a_branch_sees_the_values_of_the_codes(way, quantized):
    for name, layer, x, split in cases():
        if split or name == "one dimension":
            continue
        module = quantized(layer, x, act_range="dynamic")
        down, up = torch.randn(4, *layer.weight.shape[1:]), torch.randn(len(layer.weight), 4)
        branch = LowRankBranch(down, up, torch.ones(4), module.options or None)
        lowered, seen = branched(integer_layer(module, SimulatedLayer), branch), module.quantized_input(x)
        change = torch.einsum("or,r...->o...", up, down)
        expected = module(x) + module.op(seen, change, None, **module.options)
        for actual, of in zip(lowered(x), expected, strict=True):
            assert (actual - of).abs().max() <= 2e-5 * of.abs().max(), name


@torch.no_grad()
def test_a_norm_of_a_layers_output_is_that_of_its_products(way, quantized):
    norm = nn.GroupNorm(4, 12)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 9, 16, 17) * torch.tensor([1.0, 100.0]).view(-1, 1, 1, 1)
    layer = integer_layer(quantized(nn.Conv2d(9, 12, 3, padding=1), x, act_range="dynamic"), SimulatedLayer)
    added, to = torch.randn(2, 12), params_for("sample", padding=(1, 1))
    codes = layer.group_norm(layer.quantize(x), norm, to, torch.float32, added=added, silu=True)
    y = F.silu(norm(layer(x) + added[:, :, None, None]))
    assert_steps(codes, reference(y, to))
