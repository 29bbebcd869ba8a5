"""Low-rank branches beside integer layers: against float64, with every backend, in whole UNets, and taken away."""

from itertools import product

import pytest
import torch
from torch import nn

from ldm.modules.low_rank import LowRank, LowRankBranch
from qdiff import QuantConfig, QuantModel, load_cali_ckpt
from qdiff.engine import step_cache
from qdiff.engine.backends.expanding import expanding
from qdiff.engine.backends.int_mm import int_matmul_layer
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.layers import CodesLayer, OffsetIntegerLayer, WideIntegerLayer, integer_layer
from qdiff.engine.lora import BranchedCodesLayer, convolutions, set_branches
from qdiff.engine.lower import lower
from qdiff.engine.quant_params import QuantParams

SCALE = 0.7


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def backends(cpu_backend):
    def choose(**settings):
        cpu = cpu_backend(**settings)
        return [SimulatedLayer] if cpu is None else [SimulatedLayer, int_matmul_layer, cpu, expanding(cpu)]

    return choose


def low_rank(shape, rank=3, strength=0.5):
    down = torch.randn(rank, *shape[1:]) / down_norm(shape)
    return LowRank(down=down, up=torch.randn(shape[0], rank), strength=strength)


def down_norm(shape):
    return torch.tensor(shape[1:]).prod().sqrt()


def expected_of(module, x, changes):
    """Return the layer's output in float64, with the changes in its weight. changes: [(change, scale)]."""
    weight = module.quantized_weight().double() + sum(scale * change.delta().double() for change, scale in changes)
    bias = None if module.bias is None else module.bias.double()
    return module.op(module.quantized_input(x).double(), weight, bias, **module.options)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.slow
def test_a_layer_with_a_branch_is_the_layer_with_the_changed_weight(quantized, backends, cases):
    kinds = set()
    for (name, layer, shape, settings), act in product(cases, ({}, {"act_bit": 12})):
        if "groups" in name or (act and settings):  # no layer of a UNet is of groups
            continue
        x = torch.randn(shape) + 0.7
        module = quantized(layer, x, **settings | act)
        first, second = low_rank(module.weight.shape), low_rank(module.weight.shape, rank=2)
        for backend in backends(**settings):
            model = nn.Sequential(integer_layer(module, backend))
            plain = model[0](x)
            options = module.options or None
            set_branches(model, {"0": LowRankBranch.of([(first, SCALE), (second, -0.4)], options)})
            kinds.add(type(model[0].layer))
            expected = expected_of(module, x, [(first, SCALE), (second, -0.4)])
            assert relative_error(model(x), expected) < 3e-6, name
            assert model(x.bfloat16()).dtype == torch.bfloat16
            inexact = model[0].to_float(model[0].quantize(x), torch.bfloat16)
            assert relative_error(inexact, expected) < 2**-6, name
            set_branches(model, {"0": LowRankBranch.of([(first, SCALE)], options)})
            assert relative_error(model(x), expected_of(module, x, [(first, SCALE)])) < 3e-6, name
            set_branches(model, {})
            assert torch.equal(model(x), plain) and not isinstance(model[0], BranchedCodesLayer), name
    assert {WideIntegerLayer, OffsetIntegerLayer, SimulatedLayer} < kinds


def test_codes_of_a_layer_with_a_branch(quantized, backends):
    x, params = torch.randn(2, 9, 32), QuantParams(delta=0.05, zero_point=120, high=255)
    module = quantized(nn.Linear(32, 48, bias=False), x)
    change = low_rank((48, 32))
    reference = (expected_of(module, x, [(change, SCALE)]) / params.delta).round() + params.zero_point
    for backend in backends():
        model = nn.Sequential(integer_layer(module, backend))
        set_branches(model, {"0": LowRankBranch.of([(change, SCALE)])})
        codes = model[0].to_codes(model[0].quantize(x), params)
        assert codes.dtype == torch.uint8
        difference = (codes.double() - reference.clamp(0, params.high)).abs()
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_both_parts_of_a_split_layer_get_the_branch(quantized, backends):
    for bits, split in product((4, 8), (1, 6)):
        x = torch.cat([torch.randn(2, split, 6, 5) * 3 + 1, torch.rand(2, 16 - split, 6, 5)], dim=1)
        module = quantized(nn.Conv2d(16, 32, 1), x, split, weight_bit=bits)
        change = low_rank((32, 16, 1, 1))
        for backend in backends(weight_bit=bits):
            model = nn.Sequential(integer_layer(module, backend))
            plain = model(x)
            set_branches(model, {"0": LowRankBranch.of([(change, SCALE)], module.options)})
            assert relative_error(model(x), expected_of(module, x, [(change, SCALE)])) < 3e-6
            set_branches(model, {})
            assert torch.equal(model(x), plain)


def test_a_quantized_layer_that_is_not_lowered_gets_a_branch(quantized):
    x = torch.randn(2, 8, 6, 5)
    for split in (0, 3):
        module = quantized(nn.Conv2d(8, 6, 1), x, split)
        change, model = low_rank((6, 8, 1, 1)), nn.Sequential(module)
        set_branches(model, {"0": LowRankBranch.of([(change, SCALE)], module.options)})
        assert relative_error(model(x), expected_of(module, x, [(change, SCALE)])) < 3e-6
        set_branches(model, {})
        assert model[0] is module


# --- whole UNets -------------------------------------------------------------------------------------------


@pytest.fixture
def make_lowered(make_unet, golden_ckpt):
    """(blocks) -> (UNet, branches on all its layers); not lowered with None."""

    def make(blocks):
        qnn = QuantModel(make_unet(), QuantConfig(weight_bit=4, quant_act=True, act_bit=8, sm_abit=16, split=True))
        load_cali_ckpt(qnn, golden_ckpt)
        options = convolutions(qnn.model)
        shapes = {name.removeprefix("model."): layer.weight.shape for name, layer in qnn.layers().items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            changes = {name: low_rank(shape, rank=2, strength=0.1) for name, shape in shapes.items()}
        branches = {name: LowRankBranch.of([(change, SCALE)], options.get(name)) for name, change in changes.items()}
        if blocks is not None:
            lower(qnn, SimulatedLayer, blocks=blocks)
        return qnn, branches

    return make


@pytest.mark.slow
def test_a_lowered_unet_with_branches_computes_what_the_quantized_one_does(make_lowered, golden):
    inputs = tuple(golden[f"in_B1/{name}"] for name in ("x", "t", "context"))
    outputs = {}
    for blocks in (None, False, True):
        qnn, branches = make_lowered(blocks)
        plain = qnn(*inputs)
        set_branches(qnn.model, branches)
        outputs[blocks] = qnn(*inputs)
        assert relative_error(plain, outputs[blocks]) > 0.2, "the branches change something"
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(qnn(*inputs).float(), outputs[blocks]) < 0.15
        set_branches(qnn.model, {})
        assert torch.equal(qnn(*inputs), plain)
    for blocks in (False, True):  # codes near a tie may tip over: see tests/goldens/README.md
        assert relative_error(outputs[blocks], outputs[None]) < 0.1


def test_every_layer_of_a_lowered_unet_is_found(make_lowered):
    qnn, branches = make_lowered(True)
    before = sum(isinstance(module, CodesLayer) for module in qnn.modules())
    set_branches(qnn.model, branches)
    beside = [module.layer for module in qnn.modules() if isinstance(module, BranchedCodesLayer)]
    assert len(beside) == len(set(beside)) == before


def test_what_is_kept_from_step_to_step_is_dropped_with_the_branches(make_lowered, golden):
    qnn, branches = make_lowered(True)
    x, t, context = (golden[f"in_B1/{name}"] for name in ("x", "t", "context"))
    times = [float(t[0])]
    expected = {}
    for scaled in (branches, {}):
        set_branches(qnn.model, scaled)
        expected[bool(scaled)] = qnn(x, t, context)
    with step_cache.walk(qnn, times):
        for scaled in (branches, {}, branches):
            set_branches(qnn.model, scaled)
            for _ in range(2):
                assert torch.equal(qnn(x, t, context), expected[bool(scaled)])
