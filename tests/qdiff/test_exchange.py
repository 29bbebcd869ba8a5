"""Exchanged modules: they hold what the original holds, and give it back."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn as nn

from ldm.modules.diffusionmodules.openaimodel import ResBlock
from qdiff.exchange import Exchanged, check_unmerged, children_of, eject, exchange, put_module, release


class Block(nn.Module):
    """Two layers, one of them under two names, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.last = nn.Sequential(nn.Linear(3, 3), nn.SiLU())
        self.gain = nn.Parameter(torch.ones(3))
        self.times = 2

    def forward(self, x):
        return self.last(self.second(self.first(x))) * self.gain * self.times


class OtherBlock(Exchanged, Block):
    FIELDS = ("times",)


class OtherLinear(Exchanged, nn.Linear):
    FIELDS = ("in_features", "out_features")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Block(), nn.ModuleDict({"inner": Block()})["inner"])


def names_and_types(module):
    return [(name, type(part)) for name, part in module.named_modules(remove_duplicate=False)]


def test_children_under_several_names_are_all_listed():
    block = ResBlock(32, 16, 0.0)
    assert block.h_upd is block.x_upd
    names = [name for name, _ in children_of(block)]
    assert names == ["in_layers", "h_upd", "x_upd", "emb_layers", "out_layers", "skip_connection"]
    made = Exchanged(block)
    assert made.h_upd is made.x_upd is block.h_upd
    assert [name for name, _ in children_of(made)] == names


@torch.no_grad()
def test_an_exchanged_block_has_all_that_the_original_has():
    block = Block().eval()
    made = OtherBlock(block)
    x = torch.randn(4, 3)
    assert isinstance(made, Block) and made.original is block
    assert torch.equal(made(x), block(x))
    assert list(made.state_dict()) == list(block.state_dict())
    assert [name for name, _ in made.named_modules()] == [name for name, _ in block.named_modules()]
    assert all(a is b for a, b in zip(made.parameters(), block.parameters(), strict=True))
    assert made.times == 2 and not made.training


@torch.no_grad()
def test_eject_undoes_exchange(model):
    x = torch.randn(2, 3)
    model[1].last[0].eval()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    expected = model(x)
    before, modules = names_and_types(model), list(model.modules())
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in modules]
    exchange(model, {Block: OtherBlock, nn.Linear: OtherLinear})
    kinds = {type(module) for module in model.modules()}
    assert OtherBlock in kinds and OtherLinear in kinds and not {Block, nn.Linear} & kinds
    assert model[1].first is model[1].second  # one object in both slots
    assert [name for name, _ in names_and_types(model)] == [name for name, _ in before]
    assert torch.equal(model(x), expected)
    eject(model)
    assert names_and_types(model) == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    calls.clear()
    assert torch.equal(model(x), expected) and calls == [1]


def test_eject_takes_one_kind_alone(model):
    before = names_and_types(model)
    exchange(model, {Block: OtherBlock})
    exchange(model, {nn.Linear: OtherLinear})
    eject(model, OtherLinear)
    assert type(model[1]) is OtherBlock and type(model[1].first) is nn.Linear
    eject(model, OtherBlock)
    assert names_and_types(model) == before


def test_a_chain_is_ejected_link_by_link():
    class Third(OtherBlock):
        pass

    model = nn.Sequential(Block())
    exchange(model, {Block: OtherBlock})
    exchange(model, {OtherBlock: Third})
    assert model[0].times == 2 and type(model[0].original) is OtherBlock
    eject(model)
    assert type(model[0]) is OtherBlock
    eject(model)
    assert type(model[0]) is Block


def test_a_released_original_is_freed_and_cannot_be_put_back(model):
    exchange(model, {Block: OtherBlock, nn.Linear: OtherLinear})
    originals = [weakref.ref(module.original) for module in model.modules() if isinstance(module, Exchanged)]
    assert all(original() is not None for original in originals)
    release(model)
    gc.collect()
    assert [original() for original in originals] == [None] * len(originals)
    before = names_and_types(model)
    with pytest.raises(ValueError, match="the original of this OtherLinear is gone: load the model anew"):
        eject(model)
    assert names_and_types(model) == before


def test_put_module_fills_a_slot_at_any_depth(model):
    layer = nn.Linear(3, 3)
    put_module(model, "1.last.0", layer)
    assert model[1].last[0] is layer
    put_module(model, "0", layer)
    assert model[0] is layer


def test_a_model_that_merges_tokens_is_told(model):
    check_unmerged(model)
    model[1].first.token_merging = object()
    with pytest.raises(ValueError, match=r"quantize first, merge tokens last \(tomesd\.remove_patch"):
        check_unmerged(model)
