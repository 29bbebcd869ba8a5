"""The options of a benchmark: defaults, and what contradicts what."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsdiff.benchmark.options import CAPS, DRAWS, BenchmarkOptions, Draw
from dsdiff.models.registry import EMBEDDED, ROOT, STABLE_DIFFUSION
from qdiff.engine import cpu


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
        ({"engines": ("bf16", "fp16"), "pictures": True}, "engine fp16 has no pictures"),
        ({"peers": ("tensorrt",)}, "peer 'tensorrt' is unknown"),
        ({"ratios": (0.0, 0.8)}, "ratio is 0.8"),
        ({"weight_bit": 3}, "weight_bit is 3"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"startup": True, "memory": True}, "memory has no effect"),
        ({"startup": True, "engines": ("int8",), "peers": ("diffusers-bf16",)}, "--engine, --peers has no effect"),
        ({"startup": True, "ratios": (0.5,), "weight_bit": 8}, "--ratio, --weight_bit has no effect"),
        ({"startup": True, "seconds": 2.0}, "seconds has no effect"),
        ({"startup": True, "pictures": True}, "pictures has no effect on the time to start"),
        ({"startup": True, "isa": ()}, "isa has no effect on the time to start"),
        ({"pictures": True, "memory": True}, "memory has no effect on whole pictures"),
        ({"pictures": True, "batch": 1, "latents": (8, 8)}, "--batch, --latents has no effect on whole pictures"),
        ({"full": True}, "full has no effect without --pictures"),
        ({"draws": (Draw(sampler="ddim", steps=3),)}, "draws has no effect without --pictures"),
        ({"pictures": True, "full": True, "steps_measured": 8}, "steps_measured has no effect with --full"),
        ({"pictures": True, "steps_measured": 1}, "steps_measured is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"isa": ("SSE2",)}, "isa 'SSE2' is unknown"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError) as refused:
            BenchmarkOptions(**given)
        assert message in str(refused.value), given


def test_caps_are_those_of_the_engine():
    assert tuple(cpu.ISAS) == CAPS


def test_ways_to_draw_are_read():
    assert Draw.parse("plms:50") == Draw(sampler="plms", steps=50)
    assert Draw.parse("dpm_solver:4:1") == Draw(sampler="dpm_solver", steps=4, scale=1.0)
    assert Draw.parse("lcm:2:1.5:tiny") == Draw(sampler="lcm", steps=2, scale=1.5, tiny=True)
    told = ["50 plms", "20 dpm_solver", "4 dpm_solver without guidance", "4 lcm, tiny decoder"]
    assert [str(draw) for draw in DRAWS] == told
    for text in ("plms", "plms:x", "foo:20", "plms:0", "plms:5:-1", "plms:5:1:2", ""):
        with pytest.raises(ValueError, match=f"^'{text}'.*(SAMPLER:STEPS|must be)"):
            Draw.parse(text)


def test_ratios_depend_on_what_is_measured():
    assert BenchmarkOptions().chosen_ratios == (0.0, 0.3, 0.5)
    assert BenchmarkOptions(pictures=True).chosen_ratios == (0.0, 0.5)
    assert BenchmarkOptions(pictures=True, ratios=(0.3,)).chosen_ratios == (0.3,)


def test_options_import_no_torch():
    code = "import sys, dsdiff.benchmark.options; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
