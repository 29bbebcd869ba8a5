"""What doctor.py finds, and what it advises where something is missing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsdiff import doctor
from dsdiff.models.registry import CHECKPOINTS, EMBEDDED, ROOT, STABLE_DIFFUSION


def advice_by_topic(tmp_path):
    findings = doctor.examine(tmp_path / "new" / "outputs")
    return {
        topic: [f.advice for f in findings if f.topic == topic and f.advice] for topic in {f.topic for f in findings}
    }


def test_a_job_without_room_is_named_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 64e9)
    disk = SimpleNamespace(free=10**12)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: disk)
    assert advice_by_topic(tmp_path)["room"] == []
    monkeypatch.setattr(doctor, "available_memory", lambda: 2e9)
    assert advice_by_topic(tmp_path)["room"] == [
        "not enough memory: a file of export.py",
        "not enough memory: fewer --samples_w",
    ]
    disk.free = 10
    assert advice_by_topic(tmp_path)["room"][0] == "not enough disk: --low_memory, smaller --H"


def test_missing_parts_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKPOINTS", {config: (tmp_path / "none",) for config in CHECKPOINTS})
    monkeypatch.setattr(doctor, "TOKENIZER", tmp_path / "none")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = advice_by_topic(tmp_path)
    assert (
        len(found["models"]) == 3
        and "--ckpt" in "".join(found["models"])
        and "git checkout" in "".join(found["models"])
    )
    assert [line.split("pip install ")[1] for line in found["extras"]] == ['".[train]"', '".[eval]"', '".[web]"']


def test_models_that_are_there_are_shown_with_their_size(tmp_path):
    text = "\n".join(f.text for f in doctor.examine(tmp_path))
    assert f"embedded model: {CHECKPOINTS[EMBEDDED][0]} (" in text and "W4 cali_w4a8.safetensors" in text
    if not any(path.is_file() for path in CHECKPOINTS[STABLE_DIFFUSION]):
        assert "Stable Diffusion v1: no file at" in text


@pytest.mark.slow
def test_without_a_compiler_the_command_says_so():
    environment = os.environ | {"CC": "/bin/false", "DSDIFF_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, ROOT / "scripts" / "doctor.py"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert "kernels   none: " in done.stdout and "-> install gcc" in done.stdout
    assert "AVX2, capped at AVX2" in done.stdout and done.stderr == ""
