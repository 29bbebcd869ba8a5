"""Attention of codes, against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from qdiff.engine import fused_ops, native
from qdiff.engine.fused_ops import SoftmaxParams
from qdiff.engine.quant_params import QuantParams

RANGES = tuple(QuantParams(delta=d, zero_point=z, high=255) for d, z in ((0.02, 120), (0.03, 9), (0.017, 255)))
SHAPES = (  # batch, heads, queries, keys, width of a head
    (2, 8, 100, 77, 40),
    (1, 4, 33, 300, 80),
    (1, 2, 64, 64, 160),
    (2, 3, 5, 7, 10),
    (1, 1, 1, 1, 3),
    (1, 2, 70, 513, 24),
    (1, 1, 9, 1100, 64),
    (1, 1, 9, 40, 65),
    (1, 1, 50, 260, 256),
    (1, 2, 300, 1024, 8),
)

pytestmark = pytest.mark.skipif(not native.has_attention(), reason="this CPU has no integer attention")


def operands(shape, *, spread=1.0):
    """Return random codes of q, k and v, and the numbers [B, heads, N, d] that they stand for, in float64.

    spread: how much of the range the codes of q and k take, which makes probabilities large.
    """
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    codes = []
    for n, zero, share in ((queries, 120, spread), (keys, 9, spread), (keys, 0, 1.0)):
        x = torch.randint(0, 256, (batch, n, heads * width), generator=generator)
        codes.append(((x - zero) * share + zero).clamp(0, 255).to(torch.uint8))
    numbers = [
        ((c.double() - r.zero_point) * r.delta).unflatten(-1, (heads, width)).transpose(1, 2)
        for c, r in zip(codes, RANGES, strict=True)
    ]
    return tuple(codes), numbers


def attended(q, k, v, softmax=None, mask=None):
    """Return attention in float64, [B, N, heads d], its softmax quantized."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    elif mask is not None:
        scores = scores + mask[:, None, None].double()
    p = scores.softmax(-1)
    if softmax is not None:
        p = (p / softmax.delta).round().clamp(0, softmax.high) * softmax.delta
    return (p @ v).transpose(1, 2).flatten(2)


def fine_quantizer(expected):
    """Return a quantizer of the values around the middle of `expected`, and which of them it does not clamp."""
    spread = float(expected.std()) or float(expected.abs().max())
    delta = spread / 60
    zero_point = round(128 - float(expected.mean()) / delta)
    codes = expected / delta + zero_point
    return QuantParams(delta=delta, zero_point=zero_point, high=255), (codes > 1) & (codes < 254)


def errors(codes, shape, expected, **options):
    """Return the differences of the results from `expected`, in steps of a fine quantizer, and its step."""
    to, inside = fine_quantizer(expected)
    out = fused_ops.attention(codes, RANGES, shape[1], to, torch.bfloat16, **options)
    assert inside.float().mean() > 0.9, shape
    return (out.double() - to.zero_point - expected / to.delta)[inside], to.delta


def test_it_is_nearer_to_float64_than_bfloat16_is():
    for shape, spread in itertools.product(SHAPES, (0.1, 0.3, 1.0)):
        codes, (q, k, v) = operands(shape, spread=spread)
        expected = attended(q, k, v)
        error, delta = errors(codes, shape, expected)
        bf16 = F.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v))).transpose(1, 2).flatten(2)
        allowed = max(0.52, 0.5 + float((bf16.double() - expected).abs().max()) / delta)
        assert error.abs().max() < allowed, (shape, spread)


def test_the_quantizer_of_the_softmax_is_honoured():
    """A step of 8 bits, and ranges of 16 and 12 bits that end below the largest probability."""
    for shape in ((1, 2, 70, 300, 40), (1, 1, 9, 77, 80)):
        codes, (q, k, v) = operands(shape, spread=0.5)
        largest = float((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).max())
        for bits, end in ((8, 1.0), (16, 0.6 * largest), (12, 0.6 * largest), (16, 1.0)):
            softmax = SoftmaxParams(delta=end / (2**bits - 1), high=2**bits - 1)
            error, delta = errors(codes, shape, attended(q, k, v, softmax), softmax=softmax)
            # Probabilities near a tie may get the other code. Then their values count by a step more or less. Tiles
            # round probabilities to bfloat16. Without the quantizer the error would be about 100.
            step = softmax.delta * float(v.abs().max()) / delta
            assert error.abs().mean() < 0.3 and error.abs().max() < 1.5 + 8 * step, (shape, bits, end)


def test_a_mask_hides_keys():
    for shape in ((2, 8, 20, 77, 40), (2, 1, 6, 300, 80)):
        codes, (q, k, v) = operands(shape)
        mask = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(3)) < 0.6
        mask[0, -5:] = False
        error, _ = errors(codes, shape, attended(q, k, v, mask=mask), mask=mask)
        assert error.abs().max() < 0.6, shape
        mask[1] = False  # these queries see nothing: they get 0
        to = QuantParams(delta=0.02, zero_point=77, high=255)
        for softmax in (fused_ops.FREE, SoftmaxParams(delta=1 / 255, high=255)):
            out = fused_ops.attention(codes, RANGES, shape[1], to, torch.bfloat16, mask=mask, softmax=softmax)
            assert (out[1] == 77).all() and not (out[0] == 77).all(), shape


def test_numbers_are_added_to_the_scores_of_keys():
    """Logarithms of how many tokens a key stands for, and numbers for which a narrow head's scores have no room."""
    for shape in ((2, 8, 20, 77, 40), (2, 1, 6, 300, 80), (1, 2, 33, 513, 24)):
        codes, (q, k, v) = operands(shape, spread=0.3)
        sizes = torch.randint(1, 17, (shape[0], shape[3]), generator=torch.Generator().manual_seed(4))
        for added in (sizes.float().log(), sizes.float() * 30 - 200):
            expected = attended(q, k, v, mask=added)
            error, _ = errors(codes, shape, expected, mask=added)
            without, _ = errors(codes, shape, expected)
            # Tiles round probabilities to bfloat16.
            assert error.abs().mean() < 0.3 and error.abs().max() < 1.5 < without.abs().max(), (
                shape,
                float(added.max()),
            )
        # A key that counts n times is n keys.
        few = sizes.clamp(max=3)
        to, steps = QuantParams(delta=0.02, zero_point=128, high=255), few[0].log().expand(shape[0], -1)
        one = fused_ops.attention(codes, RANGES, shape[1], to, torch.bfloat16, mask=steps)
        k_many, v_many = (each.repeat_interleave(few[0], dim=1) for each in codes[1:])
        many = fused_ops.attention((codes[0], k_many, v_many), RANGES, shape[1], to, torch.bfloat16)
        assert (one.int() - many.int()).abs().max() <= 1, shape


def test_a_query_depends_on_itself_alone():
    codes, _ = operands((1, 2, 100, 600, 40))
    to = QuantParams(delta=0.02, zero_point=128, high=255)
    together = fused_ops.attention(codes, RANGES, 2, to, torch.bfloat16)
    for i in (0, 7, 99):
        own = (codes[0][:, i : i + 1], *codes[1:])
        assert torch.equal(fused_ops.attention(own, RANGES, 2, to, torch.bfloat16), together[:, i : i + 1]), i
