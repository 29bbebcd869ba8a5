"""scripts/calibrate.py, and drawing with what it makes, on random weights and tiny pictures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dsdiff.calibration import estimate as calibration_estimate
from dsdiff.cli.flags import QUANTIZATION_FLAGS
from dsdiff.pipeline import CHECKPOINTS, EMBEDDED
from qdiff.checkpoint import read_cali_header
from qdiff.engine.backends import onednn
from scripts import calibrate, txt2img

TINY = ["--ddim_steps", "2", "--cali_st", "2", "--cali_n", "2", "--batch_size", "4", "--device", "cpu"]
LEARN = ["--iters_w", "2", "--iters_a", "2", "--quant_act", "--split", "--no_grad_ckpt"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\n\na blue star\n")
    return path


@pytest.fixture(scope="module")
def make(small_model, prompts):
    """make(outdir, *flags): calibrates the small model."""

    def call(outdir, *flags):
        config, ckpt = small_model
        model = ["--config", config, "--ckpt", ckpt, "--outdir", outdir]
        data = [] if "--data_path" in flags else ["--prompts", prompts]
        size = [flag for flag in TINY if "--data_path" not in flags] or ["--batch_size", "4", "--device", "cpu"]
        calibrate.main([str(flag) for flag in (*model, *data, *size, *flags)])
        return outdir

    return call


@pytest.fixture(scope="module")
def calibrated(make, tmp_path_factory):
    """The folder of an uninterrupted calibration."""
    return make(tmp_path_factory.mktemp("calibrated"), *LEARN, "--cond")


@pytest.fixture
def draw(small_model, tmp_path):
    """draw(name, *flags) -> the folder of two small pictures."""

    def call(name, *flags):
        config, ckpt = small_model
        model = ["--config", config, "--ckpt", ckpt, "--outdir", tmp_path / name]
        size = ["--H", "32", "--W", "32", "--ddim_steps", "2", "--device", "cpu", "--n_iter", "1", "--n_samples", "2"]
        txt2img.main([str(flag) for flag in (*model, *size, "--prompt", "a red circle", *flags)])
        return tmp_path / name

    return call


def picture(folder, i=0):
    return np.asarray(Image.open(folder / f"samples/{i:05}.png")).astype(int)


def error_of(capsys, call, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        call(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2
    last = lines[-1]
    assert last.startswith("error: "), lines
    return last


# --- what it writes ----------------------------------------------------------------------------------------


def test_writes_the_file_the_report_and_the_data(calibrated):
    names = sorted(path.name for path in calibrated.iterdir())
    assert names[0] == "cali.safetensors" and names[-1] == "report.json"
    assert len(names) == 3 and names[1].startswith("data-")
    header = read_cali_header(calibrated / "cali.safetensors")
    assert (header.config.weight_bit, header.config.act_bit, header.config.sm_abit) == (4, 8, 16)
    assert header.config.quant_act and header.config.split and header.merge is None
    assert header.calibration["samples"] == 8 and header.calibration["quant_mode"] == "qdiff"
    assert header.source["ckpt"] == "small.safetensors"


def test_no_unit_ends_worse_than_it_began(calibrated):
    units = json.loads((calibrated / "report.json").read_text())["units"]
    assert {unit["phase"] for unit in units} == {"weights", "activations"}
    assert all(unit["after"] <= unit["before"] for unit in units)
    assert any(unit["after"] < unit["before"] for unit in units)


def test_the_data_holds_both_branches(calibrated, small_model):
    from qdiff.calibration_set import CalibrationSet

    data = CalibrationSet.load(next(calibrated.glob("data-*")))
    assert len(data) == 8 and sorted(set(data.t.tolist())) == [1, 501]
    # Of each call the first half is without prompt: all its contexts are the same.
    without = data.context[:2]
    assert torch.equal(without[0], without[1])
    assert not torch.equal(data.context[2], without[0]) and not torch.equal(data.context[2], data.context[3])


def test_an_interrupted_calibration_taken_up_ends_with_the_same_file(make, calibrated, tmp_path, monkeypatch, capsys):
    from qdiff.resume import ProgressFolder

    plain, saved = ProgressFolder.save, []

    def save(self, number, *args):
        plain(self, number, *args)
        saved.append(number)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressFolder, "save", save)
    with pytest.raises(SystemExit) as leaving:
        make(tmp_path, *LEARN, "--cond")
    assert leaving.value.code == 130 and "--resume goes on" in capsys.readouterr().err
    assert "go on with --resume" in error_of(capsys, make, tmp_path, *LEARN, "--cond")
    other = [*LEARN, "--cond", "--iters_w", "3", "--resume"]
    assert "other settings: recon" in error_of(capsys, make, tmp_path, *other)
    make(tmp_path, *LEARN, "--cond", "--resume")
    assert sorted(saved) == list(range(len(saved)))  # each step once
    assert (tmp_path / "cali.safetensors").read_bytes() == (calibrated / "cali.safetensors").read_bytes()
    assert not (tmp_path / "progress").exists()


def test_processes_share_a_calibration(small_model, calibrated, tmp_path):
    config, ckpt = small_model
    data = next(calibrated.glob("data-*"))
    flags = ["--config", config, "--ckpt", ckpt, "--data_path", data, "--outdir", tmp_path, "--device", "cpu"]
    flags += ["--quant_act", "--split", "--iters_w", "1", "--iters_a", "0", "--batch_size", "4", "--ratio", "0.5"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "scripts/calibrate.py", *map(str, flags)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cali.safetensors", "report.json"]
    assert read_cali_header(tmp_path / "cali.safetensors").calibration["processes"] == 2


def test_ready_data_gives_the_same_file(make, calibrated, tmp_path):
    make(tmp_path, *LEARN, "--data_path", next(calibrated.glob("data-*")), "--quant_mode", "qdiff")
    old, new = (read_cali_header(folder / "cali.safetensors") for folder in (calibrated, tmp_path))
    assert old.calibration["data_sha256"] == new.calibration["data_sha256"]


def test_qdiffusions_format_draws_the_same(make, calibrated, draw, tmp_path):
    folder = make(tmp_path / "q", *LEARN, "--cond", "--format", "qdiff")
    ours = draw("ours", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    theirs = draw("theirs", "--ptq", "--cali_ckpt", folder / "cali.pth")
    assert np.abs(picture(ours) - picture(theirs)).max() <= 1


def test_merging_is_noted(make, tmp_path):
    folder = make(tmp_path, "--quant_mode", "linear", "--quant_act", "--ratio", "0.5")
    header = read_cali_header(folder / "cali.safetensors")
    assert header.merge["ratio"] == 0.5 and header.calibration["quant_mode"] == "linear"


# --- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--act_bit", "8"], "--act_bit has no effect"),
        (["--running_stat"], "--running_stat has no effect"),
        (["--quant_mode", "linear", "--iters_w", "5"], "--iters_w has no effect"),
        (["--iters_w", "0", "--warmup", "0.1"], "--warmup has no effect"),
        (["--quant_act", "--iters_a", "0", "--p", "2"], "--p has no effect"),
        (["--data_path", "x.safetensors", "--plms"], "a sampler has no effect"),
        (["--data_path", "x.safetensors", "--cond"], "--cond has no effect"),
        (["--data_path", "x.safetensors"], "No such file"),
        (["--cond", "--scale", "1"], "no branch without the prompt"),
        (["--prompts", "missing.txt"], "No such file"),
        (["--weight_bit", "1"], "in 2..16"),
        (["--iters_w", "-1"], "0 or more"),
        (["--b_start", "1", "--b_end", "5"], "b_start"),
        (["--ratio", "0.9"], "ratio is 0.9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(make, tmp_path, capsys, flags, says):
    outdir = tmp_path / "out"
    assert says in error_of(capsys, make, outdir, *flags)
    assert not (outdir / "cali.safetensors").exists() and not (outdir / "progress").exists()


def test_too_little_memory_or_disk_is_refused(make, calibrated, tmp_path, capsys, monkeypatch):
    data = ["--data_path", next(calibrated.glob("data-*"))]
    monkeypatch.setattr(calibration_estimate, "available_memory", lambda: 1000)
    assert "GiB more memory are needed" in error_of(capsys, make, tmp_path, *LEARN, *data)
    monkeypatch.undo()
    monkeypatch.setattr(calibration_estimate.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert "GiB of disk are needed" in error_of(capsys, make, tmp_path, *LEARN, *data, "--cache_gb", "0")


def test_too_little_gpu_memory_is_refused():
    calibration_estimate.check_gpu(needed=2**30, free=2**30)
    with pytest.raises(ValueError, match=r"2\.0 GiB more of the GPU's memory are needed and 1\.0 are available"):
        calibration_estimate.check_gpu(needed=2**31, free=2**30)


def test_data_of_another_model_is_refused(make, tmp_path, capsys):
    from qdiff.calibration_set import CalibrationSet

    CalibrationSet(torch.zeros(2, 4, 4, 4), torch.zeros(2), torch.zeros(2, 7, 9)).save(tmp_path / "x.safetensors")
    line = error_of(capsys, make, tmp_path / "out", *LEARN, "--data_path", tmp_path / "x.safetensors")
    assert "a context of 9, the model 4 and 128" in line


# --- drawing with it ---------------------------------------------------------------------------------------


def test_txt2img_needs_no_flag_but_the_file(draw, calibrated):
    plain = draw("plain")
    quantized = draw("quantized", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    assert 0 < np.abs(picture(plain) - picture(quantized)).mean() < 40
    settings = yaml.safe_load((quantized / "settings.yaml").read_text())
    assert settings["quantization"]["bits"] == "W4A8 sm16 split"
    info = Image.open(quantized / "samples/00000.png").info
    assert json.loads(info["dsdiff"])["quantization"]["cali_ckpt"] == "cali.safetensors"
    assert "Quantization: W4A8 sm16 split" in info["parameters"]


def test_flags_that_agree_change_nothing(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    all_flags = ["--weight_bit", 4, "--quant_act", "--act_bit", 8, "--sm_abit", 16, "--split", "--quant_mode", "qdiff"]
    first = draw("first", *cali)
    second = draw("second", *cali, *all_flags, "--cond", "--no_grad_ckpt")
    assert np.array_equal(picture(first), picture(second))


def test_activations_can_stay_float(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    both, weights = draw("both", *cali), draw("weights", *cali, "--no-quant_act")
    assert not np.array_equal(picture(both), picture(weights))
    assert yaml.safe_load((weights / "settings.yaml").read_text())["quantization"]["bits"] == "W4A32 split"


@pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")
def test_engines_draw_the_same(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors", "--ratio", 0.5]
    default, simulated = draw("default", *cali), draw("simulated", *cali, "--engine", "simulate")
    assert [
        yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]["engine"]
        for folder in (default, simulated)
    ] == ["int8", "simulate"]
    assert np.array_equal(picture(default), picture(simulated))


def test_where_int8_cannot_be_had_it_is_simulated(draw, calibrated, monkeypatch):
    monkeypatch.setattr(onednn, "works", lambda: False)
    folder = draw("quantized", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors")
    assert yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]["engine"] == "simulate"


def test_merging_comes_on_top(draw, calibrated):
    cali = ["--ptq", "--cali_ckpt", calibrated / "cali.safetensors"]
    assert not np.array_equal(picture(draw("plain", *cali)), picture(draw("merged", *cali, "--ratio", 0.5)))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--weight_bit", "8"], ["--weight_bit is 8", "weight_bit 4"]),
        (["--act_bit", "4"], ["--act_bit is 4", "act_bit 8"]),
        (["--sm_abit", "8"], ["--sm_abit is 8", "sm_abit 16"]),
        (["--quant_mode", "linear"], ["--quant_mode is linear", "quant_mode qdiff"]),
        (["--no-quant_act", "--act_bit", "8"], ["--act_bit has no effect"]),
        (["--no-quant_act", "--engine", "int8"], ["--engine int8: ", "activations are float", "use --engine simulate"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_flags_that_contradict_the_file_are_refused(draw, calibrated, capsys, tmp_path, flags, says):
    line = error_of(capsys, draw, "refused", "--ptq", "--cali_ckpt", calibrated / "cali.safetensors", *flags)
    assert all(part in line for part in says), line
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", [name for name in QUANTIZATION_FLAGS if name != "ptq"])
def test_without_ptq_no_flag_is_accepted(draw, capsys, name):
    value = {"cali_ckpt": ["x.pth"], "quant_mode": ["qdiff"], "engine": ["int8"]}.get(
        name, [8] if "bit" in name else []
    )
    assert f"--{name} has no effect: add --ptq" in error_of(capsys, draw, "refused", f"--{name}", *value)


def test_another_model_is_refused(calibrated, random_ckpt, tmp_path, capsys):
    flags = ["--ckpt", str(random_ckpt), "--prompt", "a", "--outdir", str(tmp_path / "out"), "--ddim_steps", "2"]
    flags += ["--config", "configs/shapes/txt2img.yaml", "--ptq", "--cali_ckpt", str(calibrated / "cali.safetensors")]
    assert "of another architecture" in error_of(capsys, txt2img.main, flags)
    assert not (tmp_path / "out").exists()


def test_a_model_without_cali_ckpt_needs_one(draw, capsys):
    assert "--ptq needs a --cali_ckpt" in error_of(capsys, draw, "refused", "--ptq")


# --- what comes with the embedded model --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_shipped_files_are_the_default(tmp_path, bits):
    flags = ["--config", str(EMBEDDED), "--prompt", "a red circle", "--n_iter", "1", "--n_samples", "1", "--seed", "1"]
    flags += ["--dpm_solver", "--ddim_steps", "4", "--device", "cpu"]
    txt2img.main([*flags, "--outdir", str(tmp_path / "float")])
    chosen = [] if bits == 4 else ["--weight_bit", str(bits)]
    txt2img.main([*flags, "--ptq", *chosen, "--outdir", str(tmp_path / "quantized")])
    settings = yaml.safe_load((tmp_path / "quantized/settings.yaml").read_text())["quantization"]
    assert settings["cali_ckpt"].endswith(f"models/ldm/shapes/cali_w{bits}a8.safetensors")
    assert settings["bits"] == f"W{bits}A8 sm16 split"
    error = np.square(picture(tmp_path / "float") - picture(tmp_path / "quantized")).mean()
    assert 0 < error < 255**2 / 10**1.8  # 18 dB: the same picture


def test_shipped_files_are_small():
    sizes = {path.name: path.stat().st_size for path in CHECKPOINTS[EMBEDDED][0].parent.glob("*.safetensors")}
    assert sizes["cali_w4a8.safetensors"] < 4e6 < sizes["cali_w8a8.safetensors"] < 8e6
    assert sizes["cali_w4a8.safetensors"] < sizes["model.safetensors"] / 4
