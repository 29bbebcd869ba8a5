"""The commands under torchrun: the same bytes from 1, 2 and 5 processes, and after the death of one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from scripts import img2img, txt2img

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--H", "32", "--W", "48", "--device", "cpu", "--sampler", "dpm_solver", "--seed", "5"]

pytestmark = pytest.mark.slow


@pytest.fixture
def model(small_model):
    config, ckpt = small_model
    return ["--config", str(config), "--ckpt", str(ckpt)]


@pytest.fixture
def one_thread():
    """The test's own process computes by one thread, as those of torchrun do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(script, processes, flags, restarts=0):
    """Start a command under torchrun. A thread each, as the pictures of the test's own process have."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, f"--max-restarts={restarts}", str(ROOT / "scripts" / script), *flags]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(run):
    """Return what a run has printed. It must end well."""
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0, out
    return out


def kill(run, number, has_begun):
    """Kill process `number` of a run as soon as has_begun() is true."""
    while not has_begun():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    workers = [child for child in psutil.Process(run.pid).children() if child.environ().get("LOCAL_RANK") == number]
    assert len(workers) == 1
    workers[0].kill()


def contents(folder):
    """Return the bytes of all files but the log, and those that the killed process was writing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".tmp"}


def test_a_run_of_which_a_process_dies_ends_with_the_same_bytes(model, tmp_path, one_thread):
    flags = [*model, *TINY, "--ddim_steps", "20", "--prompt", "a red circle", "--n_samples", "2", "--n_iter", "10"]
    txt2img.main([*flags, "--outdir", str(tmp_path / "one")])
    for number in ("0", "1"):
        outdir = tmp_path / f"without-{number}"
        run = launch("txt2img.py", 2, [*flags, "--outdir", str(outdir)], restarts=1)
        kill(run, number, has_begun=lambda outdir=outdir: len(list(outdir.glob("samples/*.png"))) > 3)
        out = finish(run)
        assert f"written to {outdir}" in out
        assert contents(outdir) == contents(tmp_path / "one"), number  # the mark of the run is gone, too


def test_five_processes_draw_from_pictures_what_one_draws(model, tmp_path, one_thread):
    txt2img.main([*model, *TINY, "--ddim_steps", "2", "--prompt", "a ring", "--outdir", str(tmp_path / "from")])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "a star {i}", "steps": {2 + i // 3}}}\n' for i in range(8)))
    flags = [*model, *TINY, "--init", str(tmp_path / "from/samples/00000.png"), "--from-file", str(rows)]
    flags += ["--n_samples", "2", "--ddim_steps", "2"]
    img2img.main([*flags, "--outdir", str(tmp_path / "one")])
    finish(launch("img2img.py", 5, [*flags, "--outdir", str(tmp_path / "five")]))
    assert contents(tmp_path / "five") == contents(tmp_path / "one")


def test_a_second_torchrun_adds_pictures(model, tmp_path):
    flags = [*model, *TINY, "--ddim_steps", "2", "--prompt", "a ring", "--n_samples", "1", "--outdir", str(tmp_path)]
    (tmp_path / ".begun-by-torchrun").touch()  # of one that was killed as a whole
    for numbers in (["00000.png", "00001.png"], ["00000.png", "00001.png", "00002.png", "00003.png"]):
        finish(launch("txt2img.py", 2, flags))
        assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == numbers
    assert not (tmp_path / ".begun-by-torchrun").exists()


def test_what_cannot_be_done_ends_all_processes(model, tmp_path):
    flags = [*model, *TINY, "--prompt", "a ring", "--outdir", str(tmp_path / "out"), "--skip_save"]
    run = launch("txt2img.py", 2, flags)
    out, _ = run.communicate(timeout=300)
    assert run.returncode != 0 and "error: --skip_save leaves no pictures" in out
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_which_a_process_dies_ends_with_the_same_bytes(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    flags = [*model, "--prompts", str(prompts), "--device", "cpu", "--ddim_steps", "2", "--cali_st", "2"]
    flags += [
        "--cali_n",
        "2",
        "--cond",
        "--batch_size",
        "4",
        "--rounding",
        "gptq",
        "--samples_w",
        "6",
        "--iters_a",
        "2",
    ]
    flags += ["--quant_act", "--no_grad_ckpt"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launch("calibrate.py", 2, [*flags, "--outdir", str(whole)]))
    run = launch("calibrate.py", 2, [*flags, "--outdir", str(killed)], restarts=1)
    kill(run, "1", has_begun=lambda: len(list(killed.glob("progress/step-*"))) > 3)
    finish(run)
    assert (killed / "cali.safetensors").read_bytes() == (whole / "cali.safetensors").read_bytes()
    assert not (killed / "progress").exists()
