"""What doctor.py finds, and what it advises where something is missing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dsdiff import doctor
from dsdiff.models.quantized import choose_engine
from dsdiff.models.registry import CHECKPOINTS, EMBEDDED, ROOT, STABLE_DIFFUSION
from qdiff.config import QuantConfig
from qdiff.engine.backends import onednn


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


def test_products_are_told_as_the_engine_computes_them(tmp_path, monkeypatch):
    for largest, most_bits, words in (
        (onednn.LARGEST, 8, "weights of 8 bits or less"),
        (onednn.LARGEST_IN_16_BITS, 6, "weights of 6 bits or less"),
        (0, 0, "all models are simulated"),
    ):
        for module in (onednn, doctor):
            monkeypatch.setattr(module, "largest_exact_weight", lambda largest=largest: largest)
        (told,) = (f.text for f in doctor.examine(tmp_path) if f.text.startswith("integer products"))
        assert words in told, largest
        for bits in (2, 4, 6, 7, 8):
            engine = choose_engine(None, QuantConfig(weight_bit=bits), torch.device("cpu"))
            assert engine == ("int8" if bits <= most_bits else "simulate"), (largest, bits)


@pytest.mark.slow
def test_without_a_compiler_the_command_says_so():
    environment = os.environ | {"CC": "/bin/false", "DSDIFF_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, ROOT / "scripts" / "doctor.py"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert "kernels   none: " in done.stdout and "-> install gcc" in done.stdout
    assert "AVX2, capped at AVX2" in done.stdout and done.stderr == ""
