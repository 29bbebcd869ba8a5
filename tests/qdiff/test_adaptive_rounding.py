"""AdaRoundQuantizer and soft_rounding, against recorded outputs of the reference implementation and by hand."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from qdiff.adaptive_rounding import AdaRoundQuantizer, soft_rounding
from qdiff.config import QuantConfig
from qdiff.quant_layer import SplitQuantModule
from qdiff.quantizers import FrozenQuantizer, UniformAffineQuantizer

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
with open(GOLDENS / "q_unit.json") as file:
    CASES = json.load(file)["adaround"]


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDENS / "q_unit.safetensors")


@pytest.fixture(params=CASES)
def case(request, recorded):
    """(name, uniform quantizer, weight, what was recorded by its last name)."""
    name = request.param
    found = {key.removeprefix(f"{name}/"): value for key, value in recorded.items() if key.startswith(f"{name}/")}
    method = "mse" if name.endswith("mse") else "max"
    uniform = UniformAffineQuantizer(CASES[name]["n_bits"], channel_wise=True, scale_method=method).fit(found["w"])
    return uniform, found["w"], found


def some_weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def adaround_of(weight, n_bits=4, symmetric=False):
    return AdaRoundQuantizer.from_uniform(
        UniformAffineQuantizer(n_bits, symmetric, channel_wise=True).fit(weight), weight
    )


def by_hand(alpha):
    """Two weights, 0.6 and -0.6 steps from 0, with 4-bit codes, steps of 0.5 and zero point 2."""
    values = torch.tensor([[0.5], [0.5]]), torch.tensor([[2.0], [2.0]]), torch.tensor([[alpha], [alpha]])
    return AdaRoundQuantizer(4, False, *values), torch.tensor([[0.3], [-0.3]])


# --- against the reference ---------------------------------------------------------------------------------


def test_range_is_that_of_the_uniform_quantizer(case):
    uniform, weight, found = case
    adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
    assert torch.equal(adaround.delta, found["delta"])
    assert torch.equal(adaround.zero_point, found["zero_point"].float())


def test_recorded_alpha_at_the_start(case):
    uniform, weight, found = case
    alpha = AdaRoundQuantizer.from_uniform(uniform, weight).alpha
    torch.testing.assert_close(alpha.detach(), found["alpha_init"], rtol=1e-5, atol=1e-6)


def test_recorded_outputs_at_the_start(case):
    uniform, weight, found = case
    adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
    assert torch.equal(adaround(weight), found["hard_init"])
    with soft_rounding(adaround):
        torch.testing.assert_close(adaround(weight).detach(), found["soft_init"], rtol=1e-5, atol=1e-6)


def test_recorded_outputs_of_a_learned_alpha(case):
    uniform, weight, found = case
    adaround = AdaRoundQuantizer(uniform.n_bits, False, uniform.delta, uniform.zero_point, found["alpha_rand"])
    assert torch.equal(adaround(weight), found["hard_rand"])
    with soft_rounding(adaround):
        torch.testing.assert_close(adaround(weight).detach(), found["soft_rand"], rtol=1e-5, atol=1e-6)


def test_recorded_soft_targets(case):
    uniform, weight, found = case
    adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
    torch.testing.assert_close(adaround.soft_targets().detach(), found["soft_targets_init"], rtol=1e-5, atol=1e-6)
    adaround.alpha.data = found["alpha_rand"]
    torch.testing.assert_close(adaround.soft_targets().detach(), found["soft_targets_rand"], rtol=1e-5, atol=1e-6)


def test_recorded_gradient_of_alpha(case):
    uniform, weight, found = case
    alpha = found["alpha_rand"].clone()
    adaround = AdaRoundQuantizer(uniform.n_bits, False, uniform.delta, uniform.zero_point, alpha)
    with soft_rounding(adaround):
        (adaround(weight) * found["cotangent"]).sum().backward()
    assert found["grad_alpha_rand"].abs().max() > 0
    torch.testing.assert_close(adaround.alpha.grad, found["grad_alpha_rand"], rtol=1e-5, atol=1e-7)


# --- by hand -----------------------------------------------------------------------------------------------


def test_the_sign_of_alpha_rounds_up_or_down(subtests):
    """0.6 steps lie between codes 0 + 2 and 1 + 2, -0.6 steps between -1 + 2 and 0 + 2."""
    for alpha, codes in [(-1.0, [[2.0], [1.0]]), (1.0, [[3.0], [2.0]]), (0.0, [[3.0], [2.0]])]:
        with subtests.test(alpha=alpha, codes=codes):
            adaround, weight = by_hand(alpha)
            assert adaround.codes(weight).tolist() == codes


def test_soft_codes_lie_between(subtests):
    """h(alpha) is the sigmoid stretched to [-0.1, 1.1], and cut off at 0 and 1."""
    for alpha, up in [(0.0, 0.5), (2.5, 1.0), (-2.5, 0.0), (100.0, 1.0)]:
        with subtests.test(alpha=alpha, up=up):
            adaround, weight = by_hand(alpha)
            with soft_rounding(adaround):
                torch.testing.assert_close(adaround.codes(weight).detach(), torch.tensor([[2 + up], [1 + up]]))


def test_codes_stay_within_their_limits():
    delta, zero_point = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    adaround = AdaRoundQuantizer(2, False, delta, zero_point, torch.tensor([[9.0, 9.0, -9.0, -9.0]]))
    assert adaround.codes(torch.tensor([[-7.0, 7.0, -7.0, 7.0]])).tolist() == [[0, 3, 0, 3]]


def test_soft_start_is_the_weight_itself():
    weight = some_weight(4, 30)
    adaround = adaround_of(weight)
    lowest, highest = (0 - adaround.zero_point) * adaround.delta, (15 - adaround.zero_point) * adaround.delta
    with soft_rounding(adaround):
        expected = weight.clamp(lowest, highest)  # the ends, which no code reaches, by half a step at most
        torch.testing.assert_close(adaround(weight).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_tie_goes_up():
    """Where the uniform quantizer rounds half to even."""
    weight = torch.tensor([[-0.75, -0.25, 0.25, 0.75]])  # -1.5, -0.5, 0.5 and 1.5 steps
    uniform = UniformAffineQuantizer(4)
    uniform.set(torch.tensor(0.5), torch.tensor(8.0))
    adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
    assert torch.equal(adaround.alpha, torch.zeros(1, 4))
    assert adaround.codes(weight).tolist() == [[7, 8, 9, 10]]
    assert uniform.codes(weight).tolist() == [[6, 8, 8, 10]]


def test_signed_codes_keep_negative_weights(subtests):
    for soft in [False, True]:
        with subtests.test(soft=soft):
            weight = some_weight(6, 20)
            uniform = UniformAffineQuantizer(4, symmetric=True, channel_wise=True).fit(weight)
            adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
            if soft:
                with soft_rounding(adaround):
                    torch.testing.assert_close(adaround(weight).detach(), weight, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(adaround(weight), uniform(weight))  # there is no tie among these
                assert adaround.codes(weight).min() < -4


def test_half_precision_weights(subtests):
    for dtype in [torch.float16, torch.bfloat16]:
        with subtests.test(dtype=dtype):
            weight = some_weight(4, 30).to(dtype)
            adaround = adaround_of(weight)
            assert adaround.alpha.dtype == torch.float32
            assert adaround(weight).dtype == dtype
            assert torch.equal(adaround(weight), adaround(weight.float()).to(dtype))


def test_frozen_codes_are_the_hard_ones(subtests):
    for n_bits in [2, 3, 4, 8, 12]:
        for symmetric in [False, True]:
            with subtests.test(n_bits=n_bits, symmetric=symmetric):
                weight = some_weight(5, 3, 3, 3)
                adaround = adaround_of(weight, n_bits, symmetric)
                adaround.alpha.data = some_weight(5, 3, 3, 3).flip(0)
                assert torch.equal(FrozenQuantizer(adaround, weight)(weight), adaround(weight))


def test_only_alpha_is_a_parameter():
    adaround = adaround_of(some_weight(4, 30))
    assert [name for name, _ in adaround.named_parameters()] == ["alpha"]
    assert adaround.alpha.is_leaf and adaround.alpha.requires_grad
    assert set(adaround.state_dict()) == {"alpha", "delta", "zero_point"}


def test_being_on_or_off_is_taken_over(subtests):
    for enabled in [True, False]:
        with subtests.test(enabled=enabled):
            weight = some_weight(4, 30)
            uniform = UniformAffineQuantizer(4, channel_wise=True).fit(weight)
            uniform.enabled = enabled
            adaround = AdaRoundQuantizer.from_uniform(uniform, weight)
            assert adaround.enabled is enabled
            assert (adaround(weight) is weight) is not enabled


def test_an_unfitted_range_is_refused():
    with pytest.raises(ValueError, match="fit the quantizer first"):
        AdaRoundQuantizer.from_uniform(UniformAffineQuantizer(4, channel_wise=True), some_weight(4, 30))


# --- soft_rounding -----------------------------------------------------------------------------------------


def test_hard_rounding_has_no_gradient():
    weight = some_weight(4, 30)
    assert not adaround_of(weight)(weight).requires_grad


def test_both_halves_of_a_split_layer_learn():
    layer = nn.Conv2d(10, 6, 1)
    module = SplitQuantModule(layer, QuantConfig(quant_act=False), split=7)
    module.fit_weight()
    for name, part in module.weight_parts().items():
        setattr(module, name, AdaRoundQuantizer.from_uniform(getattr(module, name), part))
    with soft_rounding(module):
        module(some_weight(2, 10, 4, 4)).square().sum().backward()
    for name, part in module.weight_parts().items():
        gradient = getattr(module, name).alpha.grad
        assert gradient.shape == part.shape
        assert (gradient != 0).float().mean() > 0.5, name


def test_soft_rounding_ends_with_its_block():
    weight = some_weight(4, 30)
    adaround = adaround_of(weight)
    hard = adaround(weight)
    with soft_rounding(adaround):
        assert not torch.equal(adaround(weight), hard)
    assert torch.equal(adaround(weight), hard)


def test_soft_rounding_ends_with_an_exception():
    adaround = adaround_of(some_weight(4, 30))
    with pytest.raises(RuntimeError, match="on purpose"), soft_rounding(nn.Sequential(adaround)):
        assert adaround.soft
        raise RuntimeError("on purpose")
    assert not adaround.soft


def test_soft_rounding_within_soft_rounding():
    first, second = (adaround_of(some_weight(4, 30)) for _ in range(2))
    with soft_rounding(first):
        with soft_rounding(nn.Sequential(first, second)):
            assert first.soft and second.soft
        assert first.soft and not second.soft
    assert not first.soft and not second.soft


def test_soft_rounding_of_one_module_only():
    first, second = (adaround_of(some_weight(4, 30)) for _ in range(2))
    with soft_rounding(first):
        assert first.soft and not second.soft


def test_soft_codes_cannot_be_frozen():
    weight = torch.linspace(-1, 1, 24).reshape(4, 6)
    layer = torch.nn.Module()
    layer.quantizer = AdaRoundQuantizer.from_uniform(UniformAffineQuantizer(4, channel_wise=True).fit(weight), weight)
    with soft_rounding(layer), pytest.raises(ValueError, match="not whole"):
        FrozenQuantizer(layer.quantizer, weight)
    assert FrozenQuantizer(layer.quantizer, weight).codes().shape == weight.shape
