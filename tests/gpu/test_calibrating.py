"""scripts/calibrate.py on a GPU: each way of rounding, an interrupted run that goes on, and drawing with the file."""

import numpy as np
import pytest
from PIL import Image

from qdiff.checkpoint import read_cali_header
from qdiff.resume import ProgressFolder
from scripts import calibrate, txt2img

DATA = ["--ddim_steps", "2", "--cali_st", "2", "--cali_n", "2", "--cond", "--batch_size", "4"]
WAYS = {
    "gptq": ["--rounding", "gptq", "--samples_w", "6", "--iters_a", "2"],
    "adaround": ["--rounding", "adaround", "--iters_w", "2", "--iters_a", "2"],
    "no_grad_ckpt": ["--rounding", "adaround", "--iters_w", "2", "--iters_a", "2", "--no_grad_ckpt"],
    "merged": ["--rounding", "gptq", "--samples_w", "6", "--iters_a", "2", "--ratio", "0.5"],
    "linear": ["--quant_mode", "linear"],
    "dynamic": ["--quant_mode", "linear", "--act_range", "dynamic"],
    "mixed": ["--quant_mode", "linear", "--mixed_act", "2"],
}


@pytest.fixture
def make(small_model, tmp_path):
    """make(outdir, *flags): calibrates the small model on the GPU."""
    config, ckpt = small_model
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")

    def call(outdir, *flags):
        files = ["--config", config, "--ckpt", ckpt, "--prompts", prompts, "--outdir", outdir]
        calibrate.main([str(flag) for flag in (*files, *DATA, "--quant_act", "--split", "--device", "cuda", *flags)])
        return outdir / "cali.safetensors"

    return call


@pytest.mark.parametrize("way", list(WAYS))
def test_a_calibration_draws(make, small_model, tmp_path, way):
    path = make(tmp_path / "cali", *WAYS[way])
    assert read_cali_header(path).calibration["samples"] == 8
    config, ckpt = small_model
    flags = ["--config", config, "--ckpt", ckpt, "--ptq", "--cali_ckpt", path, "--device", "cuda"]
    flags += ["--H", "32", "--W", "32", "--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--prompt", "a ring"]
    txt2img.main([str(flag) for flag in (*flags, "--outdir", tmp_path / "drawn")])
    assert np.asarray(Image.open(tmp_path / "drawn/samples/00000.png")).std() > 1


def test_an_interrupted_calibration_goes_on(make, tmp_path, monkeypatch):
    plain, saved = ProgressFolder.save, []

    def save(self, number, *args):
        plain(self, number, *args)
        saved.append(number)
        if len(saved) == 4:
            raise KeyboardInterrupt

    whole = make(tmp_path / "whole", *WAYS["gptq"])
    with monkeypatch.context() as patch:
        patch.setattr(ProgressFolder, "save", save)
        with pytest.raises(SystemExit) as leaving:
            make(tmp_path / "halved", *WAYS["gptq"])
    assert leaving.value.code == 130
    halved = make(tmp_path / "halved", *WAYS["gptq"], "--resume")
    assert read_cali_header(halved).config == read_cali_header(whole).config
    assert halved.stat().st_size == pytest.approx(whole.stat().st_size, rel=0.01)
    assert not (tmp_path / "halved/progress").exists()
