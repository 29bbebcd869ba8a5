"""The options of a benchmark: defaults, and what contradicts what."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsdiff.benchmark.options import BenchmarkOptions
from dsdiff.models.registry import EMBEDDED, ROOT, STABLE_DIFFUSION


def test_the_config_follows_from_the_model():
    assert BenchmarkOptions().config_path == EMBEDDED
    assert BenchmarkOptions(model="sd-v1").config_path == STABLE_DIFFUSION
    for config in (Path("some.yaml"), EMBEDDED):
        assert BenchmarkOptions(config=config, random_weights=True).config_path == config


def test_options_that_cannot_be_are_refused():
    cases = [
        ({"random_weights": True}, "--random_weights contradicts the embedded model"),
        ({"model": "embedded", "random_weights": True}, "--random_weights contradicts the embedded model"),
        ({"config": Path("some.yaml")}, "add --random_weights"),
        ({"config": Path("some.yaml"), "model": "sd-v1"}, "name two models"),
        ({"model": "sd-v2"}, "model 'sd-v2' is unknown"),
        ({"engines": ("int4",)}, "engine 'int4' is unknown"),
        ({"peers": ("tensorrt",)}, "peer 'tensorrt' is unknown"),
        ({"ratios": (0.0, 0.8)}, "ratio is 0.8"),
        ({"weight_bit": 3}, "weight_bit is 3"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"startup": True, "memory": True}, "memory has no effect"),
        ({"startup": True, "engines": ("int8",), "peers": ("diffusers-bf16",)}, "engines, peers has no effect"),
        ({"startup": True, "ratios": (0.5,), "weight_bit": 8}, "ratios, weight_bit has no effect"),
        ({"startup": True, "seconds": 2.0}, "seconds has no effect"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError) as refused:
            BenchmarkOptions(**given)
        assert message in str(refused.value), given


def test_options_import_no_torch():
    code = "import sys, dsdiff.benchmark.options; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
