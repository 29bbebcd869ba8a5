"""Benchmarks under caps of the instruction set: what is capped, and the table that compares them."""

import json
from pathlib import Path

import pytest

from dsdiff.benchmark import isa
from dsdiff.benchmark.options import BenchmarkOptions, Draw
from qdiff.engine import cpu

HERE = [name for name in cpu.ISAS if cpu.ISAS[name] <= cpu.features()]


def test_caps_are_those_of_this_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "features", lambda: cpu.ISAS["AVX512_CORE"])
    assert isa.caps_here(()) == ["AVX2", "AVX512_CORE"]
    assert isa.caps_here(("AVX512_CORE", "AVX512_CORE")) == ["AVX512_CORE"]
    with pytest.raises(ValueError, match="this CPU has no AVX512_CORE_AMX: it has AVX2, AVX512_CORE"):
        isa.caps_here(("AVX2", "AVX512_CORE_AMX"))
    monkeypatch.setattr(cpu, "features", frozenset)
    with pytest.raises(ValueError, match="this CPU has no AVX2"):
        isa.caps_here(())


def test_all_that_can_be_capped_is():
    capped = isa.capped_environment("AVX2")
    assert capped["DSDIFF_MAX_CPU_ISA"] == capped["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert capped["ATEN_CPU_CAPABILITY"] == "avx2" and "PYTHONPATH" in capped
    assert "ATEN_CPU_CAPABILITY" not in {k: v for k, v in isa.capped_environment("AVX512_CORE").items() if v == "avx2"}


def test_options_pass_to_another_process():
    given = BenchmarkOptions(
        pictures=True, ratios=(0.5,), draws=(Draw(sampler="plms", steps=5),), isa=("AVX2",), outdir=Path("out")
    )
    assert isa.from_json(isa.to_json(given)) == given
    calls = BenchmarkOptions(config=Path("a.yaml"), random_weights=True, latents=(8, 16), engines=("int8",))
    assert isa.from_json(isa.to_json(calls)) == calls


def report_of(seconds, left_out=None):
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    row = {"ratio": 0.5, "speedup": spread, "speedup_openvino": None}
    calls = {**row, "engine": "int8", "seconds": {"median": seconds}}
    pictures = {**row, "name": "int8", "sampler": "plms", "steps": 50, "scale": None, "total": {"median": seconds}}
    pictures["tiny"] = False
    return {"settings": [calls], "rows": [pictures], "left_out": left_out or {}}


def test_a_column_for_each_cap():
    reports = {"AVX2": report_of(4.0), "AVX512_CORE": {**report_of(1.0), "settings": []}}
    head, line = isa.table(reports, pictures=False)
    assert head == ["engine", "ratio", "AVX2: s, x float32, x openvino-int8", "AVX512_CORE"]
    assert line == ["int8", "0.5", "4, 2, -", "-"]
    head, line = isa.table(reports, pictures=True)
    assert head[:3] == ["steps", "by", "ratio"] and line == ["50 plms", "int8", "0.5", "4, 2, -", "1, 2, -"]


def test_what_is_told_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(isa, "_measured_under", lambda cap, options: report_of(4.0, {"bf16": f"no bfloat16 in {cap}"}))
    monkeypatch.setattr(cpu, "features", lambda: cpu.ISAS["AVX2_VNNI"])
    told = isa.benchmark(BenchmarkOptions(isa=(), outdir=tmp_path))
    assert "bf16 is left out under AVX2_VNNI: no bfloat16 in AVX2_VNNI." in told
    for text in (told, (tmp_path / "isa.md").read_text()):
        assert isa.APPLIES in text and "int8" in text
    assert list(json.loads((tmp_path / "isa.json").read_text())) == ["AVX2", "AVX2_VNNI"]


@pytest.mark.slow
@pytest.mark.skipif("AVX2" not in HERE, reason="a CPU below AVX2")
def test_a_process_runs_under_the_cap(tiny_config, tmp_path):
    given = {"random_weights": True, "engines": ("float32",), "ratios": (0.0,), "repeats": 1, "seconds": 0.0}
    options = BenchmarkOptions(config=tiny_config, device="cpu", threads=1, isa=("AVX2",), outdir=tmp_path, **given)
    assert "float32" in isa.benchmark(options)
    report = json.loads((tmp_path / "AVX2" / "benchmark.json").read_text())
    assert report["machine"]["isa"] == "AVX2"
    assert (tmp_path / "AVX2" / "benchmark.md").is_file()
