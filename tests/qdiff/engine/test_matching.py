"""Tokens compared in whole numbers, against float64."""

import pytest
import torch
from torch.nn import functional as F

from qdiff.engine import native
from qdiff.engine.matching import nearest
from tomesd.merge import match_tokens

pytestmark = pytest.mark.skipif(not native.has_attention(), reason="this CPU has no such kernel")


def smooth_tokens(batch, side, width, dtype):
    """Return tokens [batch, side * side, width] that resemble their neighbours, as those of pictures do."""
    noise = torch.randn(batch, width, side, side, generator=torch.Generator().manual_seed(side))
    return F.avg_pool2d(noise, 3, 1, 1).flatten(2).transpose(1, 2).contiguous().to(dtype)


def test_the_nearest_is_that_of_float64_up_to_rounding():
    for batch, side, width, dtype in (
        (2, 16, 320, torch.bfloat16),
        (1, 13, 37, torch.float32),
        (3, 6, 4, torch.float32),
        (1, 8, 2048, torch.bfloat16),
    ):
        x = smooth_tokens(batch, side, width, dtype)
        places = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
        sources, targets = places[: side * side * 3 // 4], places[side * side * 3 // 4 :]
        best, partner = nearest(x, sources, targets)
        unit = F.normalize(x.double(), dim=-1)
        scores = unit[:, sources] @ unit[:, targets].mT
        case = (batch, side, width, dtype)
        assert (best - scores.amax(-1)).abs().max() < 0.02, case
        assert (scores.amax(-1) - scores.gather(2, partner.unsqueeze(-1)).squeeze(-1)).max() < 0.01, case


def test_it_finds_the_partner_of_float64_more_often_than_a_product_in_bfloat16():
    x = smooth_tokens(2, 32, 320, torch.bfloat16)
    places = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))
    sources, targets = places.split([32 * 32 * 3 // 4, 32 * 32 // 4])
    unit, rounded = F.normalize(x.double(), dim=-1), F.normalize(x, dim=-1)
    exact, plain = ((each[:, sources] @ each[:, targets].mT).argmax(-1) for each in (unit, rounded))
    partner = nearest(x, sources, targets)[1]
    found, found_plain = ((each == exact).double().mean() for each in (partner, plain))
    assert found > 0.98 and found > found_plain


def test_equals_zeros_and_other_lengths():
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3e-12, 6e-12], [-5.0, 1.0], [0.0, 0.0]]])
    best, partner = nearest(x * 7e3, torch.tensor([0, 2, 4]), torch.tensor([3, 2, 0, 1]))
    assert partner.tolist() == [[1, 1, 0]]  # the first of equals
    assert best[0, 2] == 0 and (best[0, :2] - 1).abs().max() < 0.01


def test_what_it_does_not_know_is_left_to_pytorch():
    places = torch.arange(4)
    assert nearest(torch.randn(1, 8, 4096), places, places) is None
    assert nearest(torch.randn(1, 8, 4).half(), places, places) is None
    x = smooth_tokens(1, 8, 4096, torch.float32)
    plain, given = (match_tokens(x, 8, 8, 2, 2, 20, nearest=each) for each in (None, nearest))
    assert torch.equal(plain.dst_idx, given.dst_idx)
