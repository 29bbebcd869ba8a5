"""MergeOptions, and that commands can read them without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import tomesd
from tomesd.options import MergeOptions

ROOT = Path(__file__).parents[2]

BAD = [
    ({"ratio": -0.1}, r"ratio is -0.1.*\[0, 0.75\]"),
    ({"ratio": 0.76}, r"ratio is 0.76.*\[0, 0.75\]"),
    ({"ratio": 0.76, "sx": 1}, r"\[0, 0.5\]"),
    ({"ratio": float("nan")}, "ratio is nan"),
    ({"ratio": float("inf")}, "ratio is inf"),
    ({"ratio": "0.5"}, "ratio is '0.5'"),
    ({"ratio": True}, "ratio is True"),
    ({"ratio": 0.1, "sx": 1, "sy": 1}, r"\[0, 0\]"),
    ({"sx": 0}, "sx is 0"),
    ({"sy": -2}, "sy is -2"),
    ({"sy": 2.0}, "sy is 2.0"),
    ({"max_downsample": 3}, "max_downsample is 3"),
    ({"max_downsample": True}, "max_downsample is True"),
    ({"use_rand": "yes"}, "use_rand is 'yes'"),
    ({"merge_attn": False}, "nothing to merge"),
    ({"proportional": 1}, "proportional is 1"),
    ({"merge_kv": True, "merge_attn": False, "merge_mlp": True}, "merge_kv is about self-attention"),
    ({"proportional": True, "merge_attn": False, "merge_mlp": True}, "proportional is about self-attention"),
    ({"merge_every": 0}, "merge_every is 0"),
    ({"merge_every": 1.5}, "merge_every is 1.5"),
    ({"merge_share": None}, "merge_share is None"),
    ({"merge_schedule": "0:0.8"}, r"a ratio of merge_schedule is 0.8.*\[0, 0.75\]"),
    ({"merge_schedule": "linear:0.5:-1"}, "a ratio of merge_schedule is -1"),
    ({"merge_schedule": "0.5"}, "merge_schedule is '0.5': write PLACE:RATIO"),
    ({"merge_schedule": 0.5}, "merge_schedule is 0.5: write"),
    ({"merge_levels": "1:0.9"}, r"a ratio of merge_levels is 0.9.*\[0, 0.75\]"),
    ({"merge_levels": "3:0.5"}, "merge_levels is '3:0.5': write LEVEL:RATIO"),
    ({"merge_levels": "1:0.5,1:0.4"}, "merge_levels is"),
    ({"merge_levels": "1:0.5", "max_downsample": 2}, "max_downsample has no effect beside merge_levels"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"seed": 0.5}, "seed is 0.5"),
    ({"seed": True}, "seed is True"),
]


def test_bad_options_are_refused_and_the_model_is_not_touched(net, everything):
    before = everything(net)
    for options, message in BAD:
        with pytest.raises(ValueError, match=message):
            MergeOptions(**options)
        with pytest.raises(ValueError, match=message):
            tomesd.apply_patch(net, **options)
        assert everything(net) == before, options


def test_layers_are_those_switched_on():
    for options, layers in [
        ({}, ("attn1",)),
        ({"merge_crossattn": True}, ("attn1", "attn2")),
        ({"merge_attn": False, "merge_mlp": True}, ("ff",)),
    ]:
        assert MergeOptions(**options).layers() == layers, options


def test_options_are_imported_without_torch():
    code = (
        "import sys, tomesd.options, tomesd; from tomesd import MergeOptions; MergeOptions(ratio=0.5); dir(tomesd); "
        "assert MergeOptions is tomesd.options.MergeOptions; assert 'torch' not in sys.modules; "
        "tomesd.merge.match_tokens; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there_and_no_other():
    assert set(tomesd.__all__) <= set(dir(tomesd))
    assert all(getattr(tomesd, name) is not None for name in tomesd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'apply_pach'"):
        tomesd.apply_pach  # noqa: B018
