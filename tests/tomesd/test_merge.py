"""Matching, merging and unmerging, against recorded results of the reference implementation and on edge cases."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tomesd.merge import bipartite_soft_matching_random2d, choose_destinations, match_tokens

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "tome.json").read_text())["cases"]
RANDOM_CASES = [name for name, case in CASES.items() if not case["no_rand"] and not case["identity"]]
MERGING_CASES = [name for name, case in CASES.items() if not case["identity"]]


@pytest.fixture(scope="module")
def goldens():
    return load_file(GOLDENS / "tome.safetensors")


def grid_of(case):
    return case["w"], case["h"], case["sx"], case["sy"]


def generator_of(case):
    return None if case["no_rand"] else torch.Generator().manual_seed(case["generator_seed"])


def merge_pair(name, goldens):
    case = CASES[name]
    return bipartite_soft_matching_random2d(
        goldens[f"{name}/metric"], *grid_of(case), case["r"], case["no_rand"], generator_of(case)
    )


def in_our_order(merged, name, goldens, matching):
    """Return the golden's merged tokens with its destinations permuted to our order.

    The order among destinations is that of torch's sort of equal keys, which depends on the processor.
    """
    staying = matching.unm_idx.shape[1]
    golden_order = goldens[f"{name}/b_idx"].tolist()
    places = [staying + golden_order.index(position) for position in matching.b_idx.tolist()]
    return merged[:, list(range(staying)) + places]


def match_golden(name, goldens):
    case = CASES[name]
    choice = goldens[f"{name}/rand_idx"].long() if f"{name}/rand_idx" in goldens else None
    return match_tokens(goldens[f"{name}/metric"], *grid_of(case), case["r"], choice)


def test_merge_and_unmerge_equal_the_goldens_bit_for_bit(goldens):
    for name in MERGING_CASES:
        merge, unmerge = merge_pair(name, goldens)
        matching = match_golden(name, goldens)
        x = goldens[f"{name}/x"]
        for mode, key in (("mean", "merged"), ("sum", "merged_sum"), ("amax", "merged_amax")):
            expected = in_our_order(goldens[f"{name}/{key}"], name, goldens, matching)
            assert torch.equal(merge(x, mode=mode), expected), (name, mode)
        assert torch.equal(unmerge(merge(x)), goldens[f"{name}/unmerged"]), name
        y = in_our_order(goldens[f"{name}/y"], name, goldens, matching)
        assert torch.equal(unmerge(y), goldens[f"{name}/y_unmerged"]), name


def test_nothing_to_merge_is_the_identity(goldens):
    for name in CASES.keys() - set(MERGING_CASES):
        merge, unmerge = merge_pair(name, goldens)
        x = goldens[f"{name}/x"]
        assert merge(x) is x and merge(x, mode="sum") is x and unmerge(x) is x, name
        assert torch.equal(x, goldens[f"{name}/unmerged"]), name


def test_index_sets_equal_the_goldens(goldens):
    for name in MERGING_CASES:
        matching = match_golden(name, goldens)
        a_idx, b_idx, unm_idx, src_idx, dst_idx = (
            goldens[f"{name}/{index}"].long() for index in ("a_idx", "b_idx", "unm_idx", "src_idx", "dst_idx")
        )
        assert sorted(matching.a_idx.tolist()) == sorted(a_idx.tolist()), name
        assert sorted(matching.b_idx.tolist()) == sorted(b_idx.tolist()), name
        # As grid positions, the rest has one right order: by descending similarity.
        assert torch.equal(matching.a_idx[matching.unm_idx], a_idx[unm_idx]), name
        assert torch.equal(matching.a_idx[matching.src_idx], a_idx[src_idx]), name
        assert torch.equal(matching.b_idx[matching.dst_idx], b_idx[dst_idx]), name
        assert matching.tokens_before == CASES[name]["tokens"], name
        assert matching.tokens_after == CASES[name]["tokens_after"], name


def test_destinations_are_drawn_from_the_given_generator(goldens):
    for name in RANDOM_CASES:
        choice = choose_destinations(*grid_of(CASES[name]), generator_of(CASES[name]))
        assert torch.equal(choice, goldens[f"{name}/rand_idx"].long()), name


def test_goldens_hold_both_merging_and_identity_cases():
    assert len(RANDOM_CASES) >= 10
    assert len(MERGING_CASES) < len(CASES)


def test_without_a_generator_random_destinations_repeat_and_leave_the_global_one_alone():
    metric = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    results = [bipartite_soft_matching_random2d(metric, 8, 8, 2, 2, 20)[0](metric) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)
    fixed = bipartite_soft_matching_random2d(metric, 8, 8, 2, 2, 20, no_rand=True)[0](metric)
    assert not torch.equal(results[0], fixed)


def test_a_tile_larger_than_the_grid_is_clipped():
    for (w, h), no_rand in product([(1, 6), (6, 1), (1, 1), (2, 1), (3, 2)], [True, False]):
        x = torch.randn(2, w * h, 4, generator=torch.Generator().manual_seed(2))
        merge, unmerge = bipartite_soft_matching_random2d(x, w, h, 4, 4, w * h, no_rand)
        tiles = max(1, w // 4) * max(1, h // 4)
        merged = merge(x, mode="sum")
        assert merged.shape == (2, tiles, 4), (w, h, no_rand)
        torch.testing.assert_close(merged.sum(dim=1), x.sum(dim=1), msg=f"{w} x {h}, {no_rand}")
        assert unmerge(merged).shape == x.shape, (w, h, no_rand)


def test_zero_tokens_attract_nobody():
    # Tokens 0 and 2 are the destinations of a 4 x 2 grid; 0 is all zeros, every source points along 2.
    x = torch.tensor([1.0, 0.0]).repeat(1, 8, 1)
    x[0, 0] = 0
    matching = match_tokens(x, 4, 2, 2, 2, r=6)
    assert sorted(matching.b_idx.tolist()) == [0, 2]
    assert matching.b_idx[matching.dst_idx].tolist() == [[2] * 6]


def test_zero_sources_merge_last():
    x = torch.tensor([1.0, 0.0]).repeat(1, 4, 1)
    x[0, 2] = 0
    matching = match_tokens(x, 2, 2, 2, 2, r=2)
    assert matching.a_idx[matching.unm_idx].tolist() == [[2]]
    assert torch.isfinite(matching.merge(x)).all()


def test_ties_are_broken_in_favour_of_the_first():
    matching = match_tokens(torch.ones(1, 16, 3), 4, 4, 2, 2, r=4)
    assert matching.src_idx.tolist() == [[0, 1, 2, 3]]
    assert matching.dst_idx.tolist() == [[0, 0, 0, 0]]


def test_mean_counts_the_destination_itself():
    x = torch.tensor([[[2.0], [4.0], [6.0], [8.0]]])
    merge, unmerge = bipartite_soft_matching_random2d(x, 2, 2, 2, 2, 3, no_rand=True)
    assert merge(x).tolist() == [[[5.0]]]
    assert unmerge(merge(x)).flatten().tolist() == [5.0] * 4


def test_gradients_pass_through_merge_and_unmerge():
    x = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    merge, unmerge = bipartite_soft_matching_random2d(x, 4, 4, 2, 2, 8, no_rand=True)
    unmerge(merge(x)).sum().backward()
    # Each group's mean is copied to all its members, so that every token counts once.
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_grids_that_do_not_fit_are_refused():
    for *grid, message in [(4, 3, 2, 2, "no 4 x 3 grid"), (0, 16, 2, 2, "at least 1"), (4, 4, 0, 2, "at least 1")]:
        with pytest.raises(ValueError, match=message):
            bipartite_soft_matching_random2d(torch.ones(1, 16, 2), *grid, 4)


def test_misused_functions_are_refused():
    x = torch.ones(1, 16, 2)
    merge, unmerge = bipartite_soft_matching_random2d(x, 4, 4, 2, 2, 4)
    with pytest.raises(ValueError, match="unknown merge mode 'median'"):
        merge(x, mode="median")
    with pytest.raises(ValueError, match=r"expected \[1, 16, C\]"):
        merge(x[:, :12])
    with pytest.raises(ValueError, match=r"expected \[1, 12, C\]"):
        unmerge(x)
    with pytest.raises(ValueError, match="does not fit 2 x 2 tiles"):
        match_tokens(x, 4, 4, 2, 2, 4, choice=torch.zeros(3, 2, dtype=torch.long))


def test_most_that_can_go_is_all_sources():
    x = torch.randn(1, 36, 4, generator=torch.Generator().manual_seed(4))
    merge, _ = bipartite_soft_matching_random2d(x, 6, 6, 3, 2, 10**6)
    assert merge(x).shape[1] == math.prod((6 // 3, 6 // 2))


def test_no_device_is_assumed_and_none_is_waited_for():
    # A meta tensor has no values: whatever read one on the host would fail.
    x = torch.empty(2, 48, 4, device="meta")
    merge, unmerge = bipartite_soft_matching_random2d(x, 8, 6, 2, 2, 24)
    merged = merge(x)
    assert merged.device.type == "meta"
    assert merged.shape == (2, 24, 4)
    assert unmerge(merged).shape == x.shape
