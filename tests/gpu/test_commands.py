"""Commands in processes of their own on a GPU: under torchrun, where processes talk by NCCL, and the benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.checkpoint import read_cali_header

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    """Return what a script has printed. command: its name and flags."""
    script, *flags = map(str, command)
    return finished([sys.executable, str(ROOT / "scripts" / script), *flags])


def torchrun(script, *flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return finished([*launcher, str(ROOT / "scripts" / script), *map(str, flags)])


def finished(command):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def model(small_model):
    config, ckpt = small_model
    return ["--config", config, "--ckpt", ckpt]


def test_torchrun_draws(model, tmp_path):
    flags = [*model, "--H", "32", "--W", "32", "--ddim_steps", "2", "--n_iter", "2", "--n_samples", "2"]
    assert "written to" in torchrun("txt2img.py", *flags, "--prompt", "a ring", "--outdir", tmp_path)
    assert len(list((tmp_path / "samples").iterdir())) == 4
    assert np.asarray(Image.open(tmp_path / "samples/00003.png")).std() > 1
    assert "device: cuda" in (tmp_path / "settings.yaml").read_text()


def test_torchrun_calibrates(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    flags = [*model, "--prompts", prompts, "--ddim_steps", "2", "--cali_st", "2", "--cali_n", "2", "--cond"]
    flags += ["--batch_size", "4", "--quant_act", "--rounding", "gptq", "--samples_w", "6", "--iters_a", "2"]
    torchrun("calibrate.py", *flags, "--outdir", tmp_path / "cali")
    assert read_cali_header(tmp_path / "cali/cali.safetensors").calibration["processes"] == 1


def test_the_benchmark(tmp_path):
    flags = ["--device", "cuda", "--engine", "float32", "fp16", "int8", "--ratio", "0", "0.5"]
    run(
        "benchmark.py",
        "--model",
        "embedded",
        *flags,
        "--repeats",
        "2",
        "--seconds",
        "0.05",
        "--memory",
        "--outdir",
        tmp_path,
    )
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["machine"]["gpu"] == torch.cuda.get_device_name(0)
    assert {row["engine"] for row in report["settings"]} == {"float32", "fp16", "int8"}
    assert all(engine["peak_bytes"] > engine["weight_bytes"] for engine in report["engines"].values())
    assert torch.cuda.get_device_name(0) in (tmp_path / "benchmark.md").read_text()
