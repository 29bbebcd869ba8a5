"""QuantConfig and ReconConfig: values that check themselves, and their dict form."""

import dataclasses
import json

import pytest

from qdiff.config import MixConfig, QuantConfig, ReconConfig

NAN, INF = float("nan"), float("inf")
CHANGED = {
    QuantConfig: {
        "weight_bit": 3,
        "act_bit": 6,
        "sm_abit": 8,
        "quant_act": False,
        "split": False,
        "scale_method": "mse",
        "act_scale_method": "max_scale",
        "act_symmetric": True,
        "mixed_act": {"model.out.2.act_quantizer": 12},
        "act_range": "dynamic",
    },
    MixConfig: {"amount": 0.5, "bits": 16, "samples": 7, "probes": 2, "seed": 3},
    ReconConfig: {
        "rounding": "gptq",
        "samples_w": 5,
        "damp": 0.5,
        "act_order": False,
        "iters_w": 7,
        "iters_a": 0,
        "batch_size": 3,
        "lr_w": 0.5,
        "lr": 1e-5,
        "p": 2.0,
        "weight": 0.0,
        "b_start": 10.0,
        "b_end": 3.0,
        "warmup": 0.5,
        "sym": True,
        "grad_checkpoint": False,
        "seed": 9,
    },
}
KINDS = list(CHANGED)


def test_defaults_are_those_of_the_published_settings():
    config = QuantConfig()
    assert (config.weight_bit, config.act_bit, config.sm_abit) == (4, 8, 16)
    assert config.quant_act and config.split and not config.act_symmetric
    assert config.scale_method == config.act_scale_method == "max"


def test_examples_change_every_setting(subtests):
    """So that no setting can be lost in the round trips below."""
    for kind in KINDS:
        with subtests.test(kind=kind):
            assert CHANGED[kind].keys() == {field.name for field in dataclasses.fields(kind)}
            assert all(getattr(kind(), name) != value for name, value in CHANGED[kind].items())


def test_to_dict_holds_the_settings(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            assert kind(**CHANGED[kind]).to_dict() == CHANGED[kind]


def test_round_trip_through_json(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            config = kind(**CHANGED[kind])
            assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_fills_in_defaults(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            assert kind.from_dict({}) == kind()


def test_from_dict_refuses_unknown_names(subtests):
    for kind in KINDS:
        with (
            subtests.test(kind=kind),
            pytest.raises(ValueError, match=f"^{kind.__name__} knows no bit, weight_bits: the file is of"),
        ):
            kind.from_dict(kind().to_dict() | {"weight_bits": 4, "bit": 4})


def test_from_dict_refuses_what_the_constructor_refuses(subtests):
    for kind, wrong in [(QuantConfig, {"act_bit": 1}), (ReconConfig, {"batch_size": 0})]:
        with (
            subtests.test(kind=kind, wrong=wrong),
            pytest.raises(ValueError, match=next(iter(wrong))),
        ):
            kind.from_dict(wrong)


def test_settings_are_frozen(subtests):
    for kind in KINDS:
        with (
            subtests.test(kind=kind),
            pytest.raises(dataclasses.FrozenInstanceError),
        ):
            setattr(kind(), dataclasses.fields(kind)[0].name, 8)


def test_settings_have_to_be_named(subtests):
    for kind in KINDS:
        with (
            subtests.test(kind=kind),
            pytest.raises(TypeError),
        ):
            kind(4)


def test_bits_from_2_to_16(subtests):
    for name in ["weight_bit", "act_bit", "sm_abit"]:
        with subtests.test(name=name):
            for bits in range(2, 17):
                assert getattr(QuantConfig(**{name: bits}), name) == bits


def test_other_bits_are_refused(subtests):
    for value in [-4, 0, 1, 17, 4.0, 4.5, "4", True, None]:
        for name in ["weight_bit", "act_bit", "sm_abit"]:
            with (
                subtests.test(value=value, name=name),
                pytest.raises(ValueError, match=rf"^{name} is {value!r}: it must be a whole number in 2\.\.16$"),
            ):
                QuantConfig(**{name: value})


def test_switches_are_booleans(subtests):
    for value in [0, 1, None, "yes"]:
        for name in ["quant_act", "split", "act_symmetric"]:
            with (
                subtests.test(value=value, name=name),
                pytest.raises(ValueError, match=f"^{name} is {value!r}: it must be True or False$"),
            ):
                QuantConfig(**{name: value})


def test_unknown_methods_are_refused(subtests):
    for value in ["", "Max", "min", None, 4]:
        for name in ["scale_method", "act_scale_method"]:
            with (
                subtests.test(value=value, name=name),
                pytest.raises(ValueError, match=f"^{name} is {value!r}: it must be one of max, max_scale, mse$"),
            ):
                QuantConfig(**{name: value})


def test_limits_of_a_reconstruction_are_allowed(subtests):
    for name, allowed in [
        ("iters_w", [0, 1]),
        ("iters_a", [0, 1]),
        ("seed", [0, 2**40]),
        ("batch_size", [1, 64]),
        ("rounding", ["adaround", "gptq", "nearest"]),
        ("samples_w", [1, 10**6]),
        ("damp", [1e-9, 0.5, 1000]),
        ("lr_w", [1e-9, 1, 1.0]),
        ("lr", [1e-9, 1, 1.0]),
        ("p", [1, 2.0, 10]),
        ("weight", [0, 1e6]),
        ("b_start", [2.0, 100]),
        ("b_end", [1, 20.0]),
        ("warmup", [0, 0.5, 1]),
    ]:
        with subtests.test(name=name, allowed=allowed):
            for value in allowed:
                assert getattr(ReconConfig(**{name: value}), name) == value


def test_other_values_of_a_reconstruction_are_refused(subtests):
    for name, refused in [
        ("iters_w", [-1, 1.0, True, "1", None]),
        ("iters_a", [-1, 1.0, True]),
        ("seed", [-1, 0.5, False]),
        ("batch_size", [0, -1, 2.0, True]),
        ("rounding", ["", "GPTQ", None]),
        ("samples_w", [0, -1, 2.0, True, None]),
        ("damp", [0, -0.1, 1001, INF, NAN, "0.1", None]),
        ("act_order", [0, None]),
        ("lr_w", [0, -1e-3, 1.01, NAN, INF, "0.1", True, None]),
        ("lr", [0, 0.0, -1e-3, 2, NAN]),
        ("p", [0.5, 10.1, NAN, True]),
        ("weight", [-0.01, 2e6, INF, NAN]),
        ("b_start", [100.5, INF, NAN]),
        ("b_end", [0.5, -1, NAN]),
        ("warmup", [-0.1, 1.1, NAN]),
        ("sym", [0, None]),
        ("grad_checkpoint", [1, "no"]),
    ]:
        with subtests.test(name=name, refused=refused):
            for value in refused:
                with pytest.raises(ValueError, match=f"^{name} is {value!r}: it must be"):
                    ReconConfig(**{name: value})


def test_annealing_does_not_rise():
    with pytest.raises(ValueError, match=r"^b_start is 3\.0: it must be a number in \[5, 100\]$"):
        ReconConfig(b_start=3.0, b_end=5.0)
