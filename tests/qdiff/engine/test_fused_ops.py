"""Fused operations, by our kernels and by PyTorch in their place, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.engine import fused_ops, native
from qdiff.engine.quant_params import QuantParams

TO = QuantParams(delta=0.031, zero_point=113, high=255)
WIDE = QuantParams(delta=0.004, zero_point=900, high=4095)


def exact_codes(x, to):
    return (x.double() / to.delta).round().add(to.zero_point).clamp(0, to.high)


def as_numbers(codes, to):
    """The codes as whole numbers, in float64. Wide ones come as two tensors of bytes."""
    assert codes.dtype == torch.uint8
    codes = codes.double()
    return codes[0] + 256 * codes[1] if to.high > 255 else codes


def assert_close(codes, values, to, share=0.02, most=1):
    """Codes of these float64 values, but for some that are next to the edge of two."""
    difference = (as_numbers(codes, to) - exact_codes(values, to)).abs()
    assert difference.max() <= most and (difference > 0).double().mean() < share


def test_codes_are_those_of_the_quantizer_bit_for_bit(way, channels_last):
    narrow = QuantParams(delta=0.02, zero_point=3, high=15)
    for dtype in (torch.float32, torch.bfloat16):
        for name, x in {
            "tokens": torch.randn(3, 5, 700).to(dtype),
            "feature map": channels_last(2, 33, 5, 7, dtype=dtype),
            "its first channels": channels_last(2, 64, 4, 4, dtype=dtype)[:, :24],
            "its last channels": channels_last(2, 64, 4, 4, dtype=dtype)[:, 24:],
            "channels first": torch.randn(2, 6, 4, 4).to(dtype),
            "strided": torch.randn(2, 3, 4, 5).to(dtype)[..., ::2],
            "one row": torch.randn(9).to(dtype),
            "nothing": torch.zeros(0, 4).to(dtype),
        }.items():
            each = (TO, WIDE, narrow)
            for codes, to in zip(fused_ops.quantize(x, *each), each, strict=True):
                expected = (x.float() / to.delta).round() + to.zero_point
                case = f"{name}, {dtype}, {to}"
                numbers = as_numbers(codes, to)
                assert torch.equal(numbers, expected.clamp(0, to.high).double()), case
                assert numbers.shape == x.shape, case


def test_extremes_are_clamped(way):
    x = torch.tensor([[float("inf"), float("-inf"), 1e30, -1e30, 0.0]])
    assert fused_ops.quantize(x, TO)[0].tolist() == [[255, 0, 255, 0, 113]]
    assert as_numbers(fused_ops.quantize(x, WIDE)[0], WIDE).tolist() == [[4095, 0, 4095, 0, 900]]


@torch.no_grad()
def test_group_norm(way, channels_last):
    for shape, groups in (((2, 64, 6, 5), 8), ((1, 640, 17, 16), 32), ((3, 8, 1, 1), 2)):
        norm = nn.GroupNorm(groups, shape[1], eps=1e-5)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        x, added = channels_last(*shape), torch.randn(shape[:2])
        for more, silu in ((None, False), (None, True), (added, False), (added, True)):
            codes = fused_ops.group_norm(norm, x, TO, added=more, silu=silu)
            y = x.double() if more is None else x.double() + more.double()[:, :, None, None]
            y = norm.double()(y)
            norm.float()
            # PyTorch rounds x + added to bfloat16, the kernel does not.
            assert_close(codes, F.silu(y) if silu else y, TO, 0.02 if way or more is None else 0.2)
        codes = fused_ops.group_norm(norm, x, WIDE, silu=True)
        # Each plane is a feature map in channels_last order, which is what convolutions read.
        assert all(plane.is_contiguous(memory_format=torch.channels_last) for plane in codes)
        y = norm.double()(x.double())
        norm.float()
        assert_close(codes, F.silu(y), WIDE, 0.05)


@pytest.mark.skipif(not native.library(), reason="no C compiler here")
def test_group_norm_of_numbers_far_from_0():
    norm = nn.GroupNorm(4, 16)
    x = (torch.randn(1, 16, 32, 32) + 300).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        codes, y = fused_ops.group_norm(norm, x, TO), norm.double()(x.double())
    assert_close(codes, y, TO)


@torch.no_grad()
def test_layer_norm(way):
    for shape in ((2, 7, 320), (1, 3, 1280), (5, 9)):
        norm = nn.LayerNorm(shape[-1])
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        x = (torch.randn(shape) * 3 + 20).bfloat16()
        y = fused_ops.layer_norm(norm, x)
        expected = norm.double()(x.double())
        assert y.dtype == x.dtype and y.shape == x.shape, shape
        assert ((y.double() - expected).abs() <= 0.005 * expected.abs() + 1e-3).all(), shape


@torch.no_grad()
def test_geglu(way):
    x = torch.randn(3, 11, 2 * 700).mul_(3).bfloat16()
    value, gate = x.double().chunk(2, dim=-1)
    # PyTorch rounds gelu and the product to bfloat16, the kernel does not.
    assert_close(fused_ops.geglu(x, TO), value * F.gelu(gate), TO, 0.01 if way else 0.2)
    if way:
        assert_close(fused_ops.geglu(x, WIDE), value * F.gelu(gate), WIDE, 0.02)


def test_attention(way):
    ranges = [QuantParams(delta=d, zero_point=z, high=255) for d, z in ((0.02, 120), (0.03, 0), (0.017, 255))]
    for batch, heads, queries, keys, width in (
        (2, 8, 100, 77, 40),
        (1, 4, 33, 300, 80),
        (1, 2, 64, 64, 160),
        (2, 3, 5, 7, 10),
        (1, 1, 1, 1, 3),
        (1, 1, 3, 4, 300),
    ):
        sizes = (queries, keys, keys)
        codes = tuple(torch.randint(0, 256, (batch, n, heads * width), dtype=torch.uint8) for n in sizes)
        q, k, v = (
            ((c.double() - r.zero_point) * r.delta).unflatten(-1, (heads, width)).transpose(1, 2)
            for c, r in zip(codes, ranges, strict=True)
        )
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for dtype in (torch.bfloat16, torch.float16):
            assert_close(fused_ops.attention(codes, tuple(ranges), heads, TO, dtype), expected, TO, 0.15)
        if way:
            wide = fused_ops.attention(codes, tuple(ranges), heads, WIDE, torch.bfloat16)
            assert_close(wide, expected, WIDE, 0.9, most=6)


def test_keys_of_another_batch_are_refused(way):
    codes = tuple(torch.zeros(batch, 4, 8, dtype=torch.uint8) for batch in (2, 1, 1))
    with pytest.raises(ValueError, match="needs the batch of its latents"):
        fused_ops.attention(codes, (TO,) * 3, 2, TO, torch.bfloat16)


def test_zero_points_beyond_the_codes(way):
    ranges = [QuantParams(delta=0.01, zero_point=z, high=255) for z in (120, 300, -2000)]
    codes = tuple(torch.randint(0, 256, (1, 9, 16), dtype=torch.uint8) for _ in range(3))
    to = QuantParams(delta=0.05, zero_point=-300, high=255)
    q, k, v = (
        ((c.double() - r.zero_point) * r.delta).unflatten(-1, (2, 8)).transpose(1, 2)
        for c, r in zip(codes, ranges, strict=True)
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    difference = fused_ops.attention(codes, tuple(ranges), 2, to, torch.bfloat16).double() - exact_codes(expected, to)
    assert difference.abs().mean() < 1.5 and difference.mean().abs() < 0.5


@torch.no_grad()
def test_norms_in_half_precision(way, channels_last):
    layer, group = nn.LayerNorm(64).bfloat16(), nn.GroupNorm(4, 64, affine=False)
    x = torch.randn(2, 5, 64).bfloat16()
    assert torch.allclose(fused_ops.layer_norm(layer, x).float(), F.layer_norm(x.float(), [64]), atol=0.02)
    image = channels_last(2, 64, 4, 4)
    assert_close(fused_ops.group_norm(group, image, TO), F.group_norm(image.double(), 4), TO)
