"""What a walk keeps from step to step, and what it must not."""

import pytest
import torch
from torch import nn

from qdiff.engine import step_cache
from qdiff.engine.quant_params import QuantParams
from qdiff.engine.step_cache import ContextLayer, StepCache, TimeLayer

PARAMS = QuantParams(delta=0.1, zero_point=3, high=255)


class Doubling(nn.Module):
    """A layer that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2

    def quantize(self, x):
        return x

    def to_codes(self, codes, params):
        self.calls += 1
        return codes + params.zero_point


class Lowered(nn.Module):
    """A stand-in for a lowered UNet."""

    def __init__(self):
        super().__init__()
        self.step_cache = StepCache()
        self.time = TimeLayer(Doubling(), self.step_cache)
        self.keys = ContextLayer(Doubling(), self.step_cache)

    def at(self, *times):
        with self.step_cache.at(torch.tensor(times)):
            return self.time(torch.tensor(times).float())


@pytest.fixture
def unet():
    with torch.no_grad():
        yield Lowered()


def test_results_of_a_time_are_kept_within_walks_of_the_same_schedule(unet):
    count = unet.time.layer
    for _ in range(2):
        with step_cache.walk(unet, [981, 961.25]):
            assert unet.at(981) is unet.at(981)
            assert unet.at(961.25).item() == 2 * 961.25
        assert count.calls == 2
    with step_cache.walk(unet, iter([961.25, 981])):  # in another order it is the same schedule
        unet.at(981)
        assert count.calls == 2
    with step_cache.walk(unet, [981]):  # another one
        unet.at(981)
        assert count.calls == 3


def test_times_are_as_exact_as_the_embedding_takes_them(unet):
    with step_cache.walk(unet, [0.1, torch.tensor(7)]):
        for time in (0.1, 7, torch.tensor(0.1, dtype=torch.float64)):
            unet.at(time)
        assert unet.time.layer.calls == 2
        unet.at(0.1001)
        unet.at(0.1001)
        assert unet.time.layer.calls == 4  # no time of the schedule


def test_outside_of_a_walk_nothing_is_kept(unet):
    context = torch.ones(1, 2, 3)
    with step_cache.walk(unet, [5]):
        kept = unet.at(5), unet.keys(context)
    assert unet.at(5) is not kept[0] and unet.keys(context) is not kept[1]
    assert unet.at(5) is not unet.at(5) and unet.keys(context) is not unet.keys(context)
    with step_cache.walk(unet, [5]):
        assert unet.at(5) is kept[0] and unet.keys(context) is not kept[1]  # a context is of one walk


def test_with_gradients_nothing_is_kept_or_used(unet):
    context = torch.ones(1, 2, 3)
    with step_cache.walk(unet, [5]):
        kept = unet.at(5), unet.keys(context)
        with torch.enable_grad():
            assert unet.at(5) is not kept[0] and unet.keys(context) is not kept[1]
        assert unet.at(5) is kept[0] and unet.keys(context) is kept[1]


def test_a_batch_of_several_times_is_not_kept(unet):
    with step_cache.walk(unet, [5, 6]):
        for times in ((5, 6), (5, 5), ()):
            assert unet.at(*times) is not unet.at(*times), times


def test_a_context_is_told_by_the_tensor_itself(unet):
    first, second = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    with step_cache.walk(unet, [5]):
        assert unet.keys(first) is unet.keys(first) and unet.keys.layer.calls == 1
        assert torch.equal(unet.keys(second), second * 2) and unet.keys.layer.calls == 2
        codes = unet.keys.to_codes(second, PARAMS)
        assert torch.equal(codes, second + 3) and unet.keys.to_codes(second, PARAMS) is codes
        other = QuantParams(delta=0.1, zero_point=4, high=255)
        assert torch.equal(unet.keys.to_codes(second, other), second + 4)


def test_a_walk_ends_with_an_error_too(unet):
    with pytest.raises(RuntimeError, match="no luck"), step_cache.walk(unet, [5]):
        kept = unet.at(5)
        raise RuntimeError("no luck")
    assert unet.at(5) is not kept


def test_a_walk_within_a_walk_leaves_the_outer_one_as_it_was(unet):
    context = torch.ones(1, 2, 3)
    with step_cache.walk(unet, [5, 6]):
        kept = unet.at(5), unet.keys(context)
        with step_cache.walk(unet, [5]):
            assert unet.at(5) is not kept[0]
            assert unet.keys(context) is not kept[1]
        assert unet.at(5) is kept[0] and unet.keys(context) is kept[1]


def test_what_moves_keeps_nothing(unet):
    with step_cache.walk(unet, [5]):
        kept = unet.at(5)
        unet.step_cache.clear()
        assert unet.at(5) is not kept and unet.at(5) is unet.at(5)


def test_a_model_that_is_not_lowered_is_left_alone():
    with step_cache.walk(nn.Linear(2, 2), [1, 2]) as nothing:
        assert nothing is None
