"""The time that commands take to start: how marks are read, and real starts."""

import subprocess
import sys

import pytest

from dsdiff.benchmark import startup
from dsdiff.benchmark.options import BenchmarkOptions
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.startup import Start
from dsdiff.models.registry import EMBEDDED, ROOT

TOLD = """
import time: self [us] | cumulative | imported package
import time:    100000 |     100000 | encodings
mark: started 10.5 0.3
import time:    500000 |     500000 |   torch
import time:    250000 |     750000 | dsdiff.pipeline
some warning | of a library
mark: imported 11.5 1.3
import time:    125000 |     125000 | tokenizers
mark: weights read 12.0 1.5
mark: model ready 12.25 1.75
mark: first step 12.5 2.0
"""


def test_the_time_is_split_into_imports_reading_and_preparing():
    start = startup.read_marks(TOLD, begin=10.0)
    assert start == Start(seconds=2.5, cpu=2.0, imports=0.975, reading=0.375, preparing=0.25)


def test_a_process_without_a_first_step_is_told():
    with pytest.raises(WorkerError, match="ended before its first step"):
        startup.read_marks(TOLD.replace("first step", "other"), begin=10.0)


@pytest.mark.slow
def test_starts_of_the_embedded_model(tmp_path):
    report = startup.startup(BenchmarkOptions(startup=True, repeats=1, device="cpu", threads=1, outdir=tmp_path))
    assert list(report.starts) == ["txt2img.py --help", "embedded model", "embedded model, --ptq"]
    told, *models = report.starts.values()
    assert told.seconds.median > 0 and told.imports is told.reading is told.preparing is None
    for start in models:
        assert 0 < start.imports + start.reading + start.preparing < start.seconds.median
    assert told.seconds.median < models[0].seconds.median
    assert models[0].preparing < models[1].preparing  # which quantizes and lowers
    startup.write(report, tmp_path)
    assert (tmp_path / "startup.json").is_file()
    for text in (startup.text(report), (tmp_path / "startup.md").read_text()):
        assert all(name in text for name in report.starts)


@pytest.mark.slow
def test_a_start_that_fails_is_told_in_one_line(tmp_path):
    request = {"ckpt": str(tmp_path / "none.ckpt"), "config": str(EMBEDDED), "ptq": False, "device": "cpu"}
    with pytest.raises(WorkerError) as failed:
        startup.model_start({**request, "threads": None})
    assert "no checkpoint at" in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.slow
def test_a_model_is_built_without_pytorchs_compiler():
    """Its import takes a second. Initial weights drawn on the meta device would need it."""
    code = (
        "import sys, dsdiff\n"
        "pipeline = dsdiff.load('embedded', engine='simulate', device='cpu')\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
