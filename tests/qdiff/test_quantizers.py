"""Quantizers against recorded outputs of the reference implementation."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from qdiff.quantizers import FrozenQuantizer, Quantizer, UniformAffineQuantizer, clamp_ste, lp_loss, round_ste

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CASE = re.compile(r"uaq/[wa]_(?P<data>\w+)/b(?P<bits>\d+)_sym(?P<sym>\d)_cw(?P<cw>\d)_(?P<method>\w+)_az(?P<az>\d)")
with open(GOLDENS / "q_unit.json") as file:
    FACTS = json.load(file)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "q_unit.safetensors")


def quantizer_of(case: re.Match) -> UniformAffineQuantizer:
    return UniformAffineQuantizer(
        int(case["bits"]),
        symmetric=case["sym"] == "1",
        channel_wise=case["cw"] == "1",
        scale_method=case["method"],
        always_zero=case["az"] == "1",
    )


def is_recorded_defect(case: re.Match, x: torch.Tensor, facts: dict) -> bool:
    """Whether the reference is known to be wrong here, or decided by a tie."""
    if case["method"] == "mse":
        return case["sym"] == "1" or facts["mse_margin"] < 1e-6
    if case["sym"] == "1":
        return False
    if case["az"] == "1" and bool(x.amin() != 0):  # the zero point is 0, but the range does not begin there
        return True
    one_sided = bool((x.amin() > 0) | (x.amax() < 0))
    if case["cw"] == "1":
        rows = x.flatten(1)
        one_sided = bool(((rows.amin(1) > 0) | (rows.amax(1) < 0)).any())
    scaled = case["method"] == "max_scale" and case["bits"] != "6"  # (6 + 2) / 8 is 1: nothing is scaled
    return one_sided or scaled


def recorded_cases():
    for name, facts in FACTS["uaq"].items():
        case = CASE.fullmatch(name)
        # Signed codes with the zero point pinned are the same as signed codes: refused as a contradiction.
        if case and not (case["sym"] == "1" and case["az"] == "1"):
            yield name, case, facts


def test_fitted_ranges_and_outputs_are_exact(golden):
    compared = 0
    for name, case, facts in recorded_cases():
        x = golden[f"uaq/x_{case['data']}"]
        if is_recorded_defect(case, x, facts):
            continue
        quantizer = quantizer_of(case).fit(x)
        for what in ("delta", "zero_point"):
            assert torch.equal(getattr(quantizer, what), golden[f"{name}/{what}"].float()), f"{name} {what}"
        assert torch.equal(quantizer(x), golden[f"{name}/out"]), name
        compared += 1
    assert compared > 300


# --- what the reference does next --------------------------------------------------------------------------


def test_second_input_with_a_fitted_range(golden, subtests):
    for method in ["max", "mse"]:
        with subtests.test(method=method):
            name = f"uaq/frozen_act4d/b8_sym0_cw0_{method}_az0"
            quantizer = UniformAffineQuantizer(8, scale_method=method).fit(golden["uaq/x_act4d"])
            assert torch.equal(quantizer(golden[f"{name}/y"]), golden[f"{name}/y_out"])
            assert torch.equal(quantizer.delta, golden[f"{name}/delta"])


def test_ranges_that_follow_the_batches(golden, subtests):
    """An exponential average of the extremes in steps 0 to 4; step 5 leaves the range alone."""
    for bits, symmetric, always_zero in [(8, 0, 0), (8, 0, 1), (16, 0, 1), (8, 1, 0)]:
        with subtests.test(bits=bits, symmetric=symmetric, always_zero=always_zero):
            name = f"running/b{bits}_sym{symmetric}_az{always_zero}"
            quantizer = UniformAffineQuantizer(bits, bool(symmetric), always_zero=bool(always_zero))
            x = golden[f"{name}/step0/x"]
            low, high = x.min(), x.max()
            # The first range that the reference fits with a pinned zero point does not begin at 0: a defect.
            quantizer.fit(x)
            for step in range(1 if always_zero else 0, 6):
                x = golden[f"{name}/step{step}/x"]
                if 0 < step < 5:
                    low, high = 0.95 * low + 0.05 * x.min(), 0.95 * high + 0.05 * x.max()
                    quantizer.set_range(low, high)
                assert torch.equal(quantizer.delta, golden[f"{name}/step{step}/delta"]), step
                assert torch.equal(quantizer.zero_point, golden[f"{name}/step{step}/zero_point"].float()), step
                assert torch.equal(quantizer(x), golden[f"{name}/step{step}/out"]), step


def test_straight_through_gradients(golden):
    quantizer = UniformAffineQuantizer(4).fit(golden["grad/uaq/init_x"])
    quantizer.delta = quantizer.delta.clone().requires_grad_()
    y = golden["grad/uaq/y"].clone().requires_grad_()
    out = quantizer(y)
    (out * golden["grad/uaq/cotangent"]).sum().backward()
    assert torch.equal(out, golden["grad/uaq/out"])
    assert torch.equal(y.grad, golden["grad/uaq/grad_y"])
    torch.testing.assert_close(quantizer.delta.grad, golden["grad/uaq/grad_delta"], rtol=1e-6, atol=0)


def test_lp_loss(golden, subtests):
    for p in [2.0, 2.4]:
        with subtests.test(p=p):
            loss = lp_loss(golden["loss/pred"], golden["loss/tgt"], p)
            torch.testing.assert_close(loss, golden[f"loss/lp_p{p}_none"], rtol=1e-6, atol=0)


def test_limits_have_no_gradient():
    x = torch.tensor([-1.0, 0.0, 0.5, 15.0, 16.0], requires_grad=True)
    clamped = clamp_ste(x, 0, 15)
    clamped.sum().backward()
    assert clamped.tolist() == [0, 0, 0.5, 15, 15] and x.grad.tolist() == [0, 0, 1, 0, 0]


def test_gradients_do_not_change_the_rounding():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    x[:4] = torch.tensor([0.5, 1.5, -0.5, 2.5])
    assert torch.is_grad_enabled()
    assert torch.equal(round_ste(x), x.round())


# --- quantizers, by hand -----------------------------------------------------------------------------------


def with_range(n_bits, delta, zero_point, symmetric=False):
    quantizer = UniformAffineQuantizer(n_bits, symmetric)
    quantizer.set(torch.tensor(delta), torch.tensor(zero_point))
    return quantizer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_unsigned_codes_by_hand():
    quantizer = with_range(2, 0.5, 1.0)
    x = torch.tensor([-1.0, -0.5, -0.25, 0.25, 0.75, 1.6])  # -2, -1, -0.5, 0.5, 1.5 and 3.2 steps
    assert quantizer.codes(x).tolist() == [0, 0, 1, 1, 3, 3]
    assert quantizer(x).tolist() == [-0.5, -0.5, 0, 0, 1, 1]


def test_signed_codes_by_hand():
    quantizer = with_range(3, 2.0, 0.0, symmetric=True)
    x = torch.tensor([-20.0, -8.0, -1.0, 1.0, 3.0, 5.0, 20.0])
    assert quantizer.codes(x).tolist() == [-4, -4, 0, 0, 2, 2, 3]
    assert quantizer(x).tolist() == [-8, -8, 0, 0, 4, 4, 6]


def test_limits_of_the_codes(subtests):
    for n_bits in range(2, 17):
        with subtests.test(n_bits=n_bits):
            unsigned, signed = Quantizer(n_bits), Quantizer(n_bits, symmetric=True)
            assert (unsigned.low, unsigned.high) == (0, 2**n_bits - 1)
            assert (signed.low, signed.high) == (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)


def test_one_range_a_channel_by_hand():
    quantizer = UniformAffineQuantizer(2, channel_wise=True)
    quantizer.fit(torch.tensor([[-1.0, 2.0], [0.0, 30.0]]))
    assert quantizer.delta.tolist() == [[1], [10]]
    assert quantizer.zero_point.tolist() == [[1], [0]]
    assert quantizer(torch.tensor([[1.2, 9.0], [12.0, -5.0]])).tolist() == [[1, 2], [10, 0]]


def test_ranges_broadcast_over_the_channel(subtests):
    for shape in [(4, 3), (4, 3, 5), (4, 3, 2, 2)]:
        with subtests.test(shape=shape):
            x = random(*shape)
            quantizer = UniformAffineQuantizer(8, channel_wise=True).fit(x)
            assert quantizer.delta.shape == quantizer.zero_point.shape == (4, *[1] * (len(shape) - 1))
            assert UniformAffineQuantizer(8).fit(x).delta.shape == ()


def test_set_range_by_hand(subtests):
    """[-1, 3] in two bits: codes 0..3 (0 is code round(3 / 4)), -2..1, and 0..3 from 0 on."""
    for settings, delta, zero_point in [
        ({}, 4 / 3, 1.0),
        ({"symmetric": True}, 3.0, 0.0),
        ({"always_zero": True}, 1.0, 0.0),
    ]:
        with subtests.test(settings=settings, delta=delta, zero_point=zero_point):
            quantizer = UniformAffineQuantizer(2, **settings)
            quantizer.set_range(torch.tensor(-1.0), torch.tensor(3.0))
            assert quantizer.delta.item() == pytest.approx(delta, rel=1e-6)
            assert quantizer.zero_point.item() == zero_point


def test_set_range_of_channels():
    quantizer = UniformAffineQuantizer(2, channel_wise=True)
    quantizer.set_range(torch.tensor([[-3.0], [0.0]]), torch.tensor([[0.0], [6.0]]))
    assert quantizer.delta.tolist() == [[1], [2]]
    assert quantizer.zero_point.tolist() == [[3], [0]]


def test_a_fit_keeps_no_graph():
    weight = nn.Parameter(random(4, 9))
    quantizer = UniformAffineQuantizer(4, channel_wise=True).fit(weight)
    assert not quantizer.delta.requires_grad and not quantizer.zero_point.requires_grad


# --- defects of the reference that are not ours ------------------------------------------------------------


def test_one_sided_data_does_not_clip(subtests):
    for sign in [1, -1]:
        for channel_wise in [False, True]:
            with subtests.test(sign=sign, channel_wise=channel_wise):
                x = sign * (3 + random(4, 50).abs())
                quantizer = UniformAffineQuantizer(4, channel_wise=channel_wise).fit(x)
                assert bool(((quantizer(x) - x).abs() <= quantizer.delta * 0.5001).all())
                assert quantizer(torch.zeros(4, 1)).tolist() == [[0]] * 4


def test_max_scale_scales_the_step(subtests):
    for n_bits in [2, 4, 6, 8, 16]:
        for symmetric in [False, True]:
            with subtests.test(n_bits=n_bits, symmetric=symmetric):
                x = random(4, 50)
                full = UniformAffineQuantizer(n_bits, symmetric, channel_wise=True).fit(x)
                scaled = UniformAffineQuantizer(n_bits, symmetric, channel_wise=True, scale_method="max_scale").fit(x)
                torch.testing.assert_close(scaled.delta, full.delta * (n_bits + 2) / 8, rtol=1e-6, atol=0)
                assert torch.equal(scaled.zero_point, full.zero_point)


def steps_of_least_error(x, n_bits):
    """Of 80 steps for signed codes, 1 % apart, the one with the least mean |error|^2.4, row by row, in float64."""
    x, high = x.double(), 2 ** (n_bits - 1) - 1
    steps = [x.abs().amax(1, keepdim=True) * (1 - 0.01 * i) / high for i in range(80)]
    errors = [((x / step).round().clamp(-high - 1, high) * step - x).abs().pow(2.4).mean(1) for step in steps]
    best = torch.stack(errors).argmin(0)
    return torch.stack(steps)[best, torch.arange(len(x))]


def test_mse_of_signed_codes_has_the_least_error(subtests):
    for n_bits in [2, 3, 4, 8]:
        with subtests.test(n_bits=n_bits):
            x = random(6, 200) ** 3  # with outliers, so that the full range is not the best
            quantizer = UniformAffineQuantizer(n_bits, symmetric=True, channel_wise=True, scale_method="mse").fit(x)
            expected = steps_of_least_error(x, n_bits)
            torch.testing.assert_close(quantizer.delta.double(), expected, rtol=1e-6, atol=0)
            assert quantizer.zero_point.abs().max() == 0
            full = UniformAffineQuantizer(n_bits, symmetric=True, channel_wise=True).fit(x)
            assert (quantizer.delta < full.delta).any()


def test_softmax_outputs_keep_their_zero(subtests):
    """The range begins at 0 although the data does not."""
    for method in ["max", "max_scale", "mse"]:
        with subtests.test(method=method):
            x = 0.2 + random(3, 8, 8).abs()
            quantizer = UniformAffineQuantizer(8, scale_method=method, always_zero=True).fit(x)
            assert quantizer.zero_point == 0
            assert quantizer(torch.zeros(2)).tolist() == [0, 0]
            if method == "max":
                torch.testing.assert_close(quantizer.delta, x.max() / 255)


def test_zeros_stay_zeros(subtests):
    for settings in [{}, {"symmetric": True}, {"always_zero": True}, {"channel_wise": True}]:
        for method in ["max", "max_scale", "mse"]:
            with subtests.test(settings=settings, method=method):
                quantizer = UniformAffineQuantizer(4, scale_method=method, **settings).fit(torch.zeros(3, 5))
                assert quantizer.is_set
                assert torch.equal(quantizer(torch.zeros(3, 5)), torch.zeros(3, 5))


# --- dtypes, and switched off ------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32(subtests):
    for n_bits in [4, 8, 16]:
        for dtype in [torch.float16, torch.bfloat16]:
            with subtests.test(n_bits=n_bits, dtype=dtype):
                x = random(8, 40).to(dtype)
                quantizer = UniformAffineQuantizer(n_bits).fit(x)
                assert quantizer.delta.dtype == quantizer.zero_point.dtype == torch.float32
                assert torch.equal(quantizer.delta, UniformAffineQuantizer(n_bits).fit(x.float()).delta)
                assert quantizer(x).dtype == dtype
                assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


def test_frozen_codes_of_half_precision_weights(subtests):
    for n_bits in range(2, 17):
        for symmetric in [False, True]:
            with subtests.test(n_bits=n_bits, symmetric=symmetric):
                weight = random(4, 30).half()
                quantizer = UniformAffineQuantizer(n_bits, symmetric, channel_wise=True).fit(weight)
                frozen = FrozenQuantizer(quantizer, weight)(weight)
                assert frozen.dtype == torch.float16
                assert torch.equal(frozen, quantizer(weight))


def test_switched_off_is_the_identity(subtests):
    for n_bits in [2, 8]:
        with subtests.test(n_bits=n_bits):
            x = random(3, 4)
            for quantizer in (UniformAffineQuantizer(n_bits), UniformAffineQuantizer(n_bits).fit(x)):
                quantizer.enabled = False
                assert quantizer(x) is x


def test_unset_until_fitted():
    quantizer = UniformAffineQuantizer(8)
    assert not quantizer.is_set
    assert quantizer.fit(random(5)) is quantizer
    assert quantizer.is_set


# --- refusals ----------------------------------------------------------------------------------------------


def test_other_bits_are_refused(subtests):
    for n_bits in [0, 1, 17, 32, 4.5, "8", None, True]:
        with (
            subtests.test(n_bits=n_bits),
            pytest.raises(ValueError, match=rf"^n_bits is {n_bits!r}: it must be a whole number in 2\.\.16$"),
        ):
            UniformAffineQuantizer(n_bits)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"^scale_method is 'min': it must be one of max, max_scale, mse$"):
        UniformAffineQuantizer(8, scale_method="min")


def test_signed_codes_with_a_pinned_zero_are_refused():
    with pytest.raises(ValueError, match="always_zero is for unsigned codes"):
        UniformAffineQuantizer(8, symmetric=True, always_zero=True)


NAN, INF = float("nan"), float("inf")


def test_impossible_values_are_refused_and_change_nothing(subtests):
    for delta, zero_point, message in [
        ([0.0], [0.0], "delta must be positive and finite"),
        ([-0.5], [0.0], "delta must be positive and finite"),
        ([0.5, NAN], [0.0, 0.0], "delta must be positive and finite"),
        ([0.5, INF], [0.0, 0.0], "delta must be positive and finite"),
        ([0.5], [0.5], "zero_point must be a whole number"),
        ([0.5], [NAN], "zero_point must be a whole number"),
        ([0.5], [INF], "zero_point must be a whole number"),
        ([0.5, 0.5], [0.0], r"delta \(2,\) and zero_point \(1,\) differ in shape"),
    ]:
        with subtests.test(delta=delta, zero_point=zero_point, message=message):
            quantizer = with_range(8, 0.25, 3.0)
            with pytest.raises(ValueError, match=message):
                quantizer.set(torch.tensor(delta), torch.tensor(zero_point))
            assert (quantizer.delta.item(), quantizer.zero_point.item()) == (0.25, 3.0)


def test_a_fit_to_values_that_are_not_finite_is_refused(subtests):
    for value in [NAN, INF, -INF]:
        for method in ["max", "max_scale", "mse"]:
            with subtests.test(value=value, method=method):
                x = random(4, 5)
                x[2, 3] = value
                quantizer = UniformAffineQuantizer(8, channel_wise=True, scale_method=method)
                with pytest.raises(ValueError, match="cannot fit a range to data with NaN or infinite values"):
                    quantizer.fit(x)
                assert not quantizer.is_set


# --- frozen codes ------------------------------------------------------------------------------------------

WEIGHTS = [(5, 7), (4, 3, 3, 3), (3, 2, 5), (6, 16)]  # rows of odd lengths, and whole octets


def frozen_of(n_bits, shape=(4, 3, 3, 3), symmetric=False):
    weight = random(*shape)
    quantizer = UniformAffineQuantizer(n_bits, symmetric, channel_wise=True).fit(weight)
    return quantizer, weight, FrozenQuantizer(quantizer, weight)


def test_frozen_equals_what_it_froze(subtests):
    for shape in WEIGHTS:
        for n_bits in range(2, 17):
            for symmetric in [False, True]:
                with subtests.test(shape=shape, n_bits=n_bits, symmetric=symmetric):
                    quantizer, weight, frozen = frozen_of(n_bits, shape, symmetric)
                    assert torch.equal(frozen(weight), quantizer(weight))
                    assert torch.equal(frozen.codes(weight), quantizer.codes(weight))


def test_frozen_codes_from_a_file(subtests):
    for shape in WEIGHTS:
        for n_bits in range(2, 17):
            with subtests.test(shape=shape, n_bits=n_bits):
                quantizer, weight, frozen = frozen_of(n_bits, shape)
                loaded = FrozenQuantizer.from_packed(frozen.packed, shape, n_bits, frozen.delta, frozen.zero_point)
                assert torch.equal(loaded(weight), quantizer(weight))


def test_frozen_codes_do_not_follow_the_weight():
    quantizer, weight, frozen = frozen_of(4)
    assert torch.equal(frozen(weight + 1), quantizer(weight))


def test_frozen_weights_take_half_a_byte_each():
    _, weight, frozen = frozen_of(4, (6, 16))
    assert frozen.packed.dtype == torch.uint8
    assert frozen.packed.numel() == weight.numel() / 2
    assert sorted(name for name, _ in frozen.named_buffers()) == ["delta", "packed", "zero_point"]
    assert not list(frozen.parameters())


def test_frozen_while_switched_off():
    quantizer, weight, _ = frozen_of(4)
    expected = quantizer(weight)
    quantizer.enabled = False
    frozen = FrozenQuantizer(quantizer, weight)
    assert frozen(weight) is weight
    frozen.enabled = True
    assert torch.equal(frozen(weight), expected)


def test_packed_codes_that_do_not_fit_are_refused(subtests):
    for change, message in [
        ({"shape": (4, 17)}, r"codes \(4, 8\) torch.uint8 do not hold 4 bits for \(4, 17\)"),
        ({"shape": (5, 16)}, r"codes \(4, 8\) torch.uint8 do not hold 4 bits for \(5, 16\)"),
        ({"n_bits": 3}, "do not hold 3 bits"),
        ({"n_bits": 16}, "do not hold 16 bits"),
        ({"packed": torch.zeros(4, 7, dtype=torch.uint8)}, r"codes \(4, 7\)"),
        ({"packed": torch.zeros(32, dtype=torch.uint8)}, r"codes \(32,\)"),
        ({"packed": torch.zeros(4, 8, dtype=torch.int8)}, "torch.int8"),
        ({"packed": torch.zeros(4, 8)}, "torch.float32"),
        ({"delta": torch.zeros(4, 1)}, "delta must be positive"),
        ({"zero_point": torch.full((4, 1), 0.5)}, "zero_point must be a whole number"),
        ({"zero_point": torch.zeros(4)}, "differ in shape"),
    ]:
        with subtests.test(change=change, message=message):
            fitting = {
                "packed": torch.zeros(4, 8, dtype=torch.uint8),
                "shape": (4, 16),
                "n_bits": 4,
                "delta": torch.ones(4, 1),
                "zero_point": torch.zeros(4, 1),
            }
            FrozenQuantizer.from_packed(**fitting)
            with pytest.raises(ValueError, match=message):
                FrozenQuantizer.from_packed(**(fitting | change))
