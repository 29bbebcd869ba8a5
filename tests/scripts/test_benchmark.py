"""The command scripts/benchmark.py: its flags, what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsdiff.benchmark.options import CALL_PEERS, BenchmarkOptions
from scripts import benchmark as script

ROOT = Path(__file__).resolve().parents[2]


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as left:
        script.main([str(flag) for flag in flags])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_flags_become_options():
    def options(*flags):
        return script.benchmark_options(script.parse_args(flags))

    assert options() == BenchmarkOptions()
    flags = "--model sd-v1 --random_weights --engine int8 bf16 --peers --ratio 0 0.5 --weight_bit 8 --memory"
    assert options(*flags.split(), "--repeats", "2", "--seconds", "0", "--threads", "1") == BenchmarkOptions(
        model="sd-v1",
        random_weights=True,
        engines=("int8", "bf16"),
        peers=CALL_PEERS,
        ratios=(0.0, 0.5),
        weight_bit=8,
        memory=True,
        repeats=2,
        seconds=0.0,
        threads=1,
    )
    assert options("--peers", "diffusers-bf16").peers == ("diffusers-bf16",)
    assert options("--config", "some.yaml", "--random_weights").config == Path("some.yaml")
    assert options("--startup", "--model", "sd-v1").startup


@pytest.mark.slow
def test_the_embedded_model_is_measured(tmp_path, capsys):
    flags = "--engine float32 --ratio 0 --repeats 1 --seconds 0 --device cpu"
    script.main([*flags.split(), "--outdir", str(tmp_path)])
    assert "txt2img.yaml: UNet of 7.0 M parameters, trained weights" in capsys.readouterr().out
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["engine"] for row in report["settings"]] == ["float32"]
    assert report["settings"][0]["speedup"] == {"median": 1, "min": 1, "max": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark.png"]


def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = [
        ("--random_weights", "--random_weights contradicts the embedded model"),
        ("--config some.yaml", "add --random_weights"),
        ("--config some.yaml --model sd-v1", "not allowed with"),
        ("--config none.yaml --random_weights", "No such file or directory"),
        ("--ratio 1.5", "in 0..1"),
        ("--ratio 0.8", "ratio is 0.8"),
        ("--repeats 0", "whole number of 1 or more"),
        ("--device tpu", "device 'tpu' is not supported"),
        ("--engine int4", "invalid choice: 'int4'"),
        ("--peers tensorrt", "invalid choice: 'tensorrt'"),
        ("--weight_bit 3", "invalid choice: 3"),
        ("--startup --memory", "memory has no effect"),
    ]
    for flags, message in cases:
        assert message in refusal(capsys, *flags.split()), flags
    assert not list(tmp_path.iterdir())


def test_help_imports_no_torch():
    code = "import sys; sys.argv[1:] = ['--help']; import runpy\n"
    code += "try: runpy.run_path('scripts/benchmark.py', run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
