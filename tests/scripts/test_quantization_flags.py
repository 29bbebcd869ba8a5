"""The flags of quantization mean what they meant in the original work, whose two command lines are here as written."""

import numpy as np
import pytest
import yaml
from PIL import Image

from dsdiff.models.configs import read_config
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from ldm.util import load_model_from_config
from qdiff import QuantModel, load_cali_ckpt, save_cali_ckpt
from qdiff.checkpoint import read_cali_header
from scripts import calibrate, txt2img

SHIPPED = CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][4]
DRAWN = ["--prompt", "a red circle", "--plms", "--n_samples", "1", "--n_iter", "1", "--ddim_steps", "2", "--skip_grid"]
# The original's command lines but for prompt, size of the run and paths.
WEIGHTS_ONLY = "--cond --ptq --weight_bit 4 --quant_mode qdiff --no_grad_ckpt --split --cali_ckpt"
WITH_ACTIVATIONS = f"--quant_act --act_bit 8 --sm_abit 16 {WEIGHTS_ONLY}"
TOLD = "W4A32 split, weights only; --quant_act adds the file's 8-bit activations"


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(flags, file) -> (settings of quantization, picture, the first line that was printed)."""

    def call(line, *more):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        txt2img.main([*DRAWN, "--config", str(EMBEDDED), "--outdir", str(folder), *line.split(), *map(str, more)])
        first = capsys.readouterr().out.splitlines()[0]
        settings = yaml.safe_load((folder / "settings.yaml").read_text())["quantization"]
        return settings, np.asarray(Image.open(folder / "samples/00000.png")).astype(int), first

    return call


@pytest.fixture(scope="module")
def both_formats(tmp_path_factory):
    """A calibration in our format and in Q-Diffusion's, which has no place for the shipped file's codes, by GPTQ."""
    folder = tmp_path_factory.mktemp("published")
    flags = "--weight_bit 4 --quant_act --act_bit 8 --sm_abit 16 --split --rounding nearest --iters_a 0"
    few = "--dpm_solver --ddim_steps 2 --cali_st 2 --cali_n 1 --device cpu"
    calibrate.main(["--config", str(EMBEDDED), "--outdir", str(folder), *flags.split(), *few.split()])
    ours, published = folder / "cali.safetensors", folder / "cali.pth"
    model = load_model_from_config(read_config(EMBEDDED), CHECKPOINTS[EMBEDDED][0])
    qnn = QuantModel(model.model.diffusion_model, read_cali_header(ours).config)
    load_cali_ckpt(qnn, ours)
    save_cali_ckpt(qnn, published, format="qdiff")
    return ours, published


def test_quant_act_decides_once_bits_are_named(draw):
    settings, weights_only, first = draw(WEIGHTS_ONLY, SHIPPED)
    assert (settings["bits"], settings["quant_act"], settings["engine"]) == ("W4A32 split", False, "simulate")
    assert settings["config"]["quant_act"] and settings["cond"] and settings["no_grad_ckpt"]
    assert first.endswith(f", {TOLD}")
    settings, both, first = draw(WITH_ACTIVATIONS, SHIPPED)
    assert (settings["bits"], settings["quant_act"]) == ("W4A8 sm16 split", True)
    assert first.endswith(", W4A8 sm16 split")
    assert (weights_only != both).any()
    # --ptq alone, with a file or without, takes all from the file.
    for line in ("--ptq", f"--ptq --cali_ckpt {SHIPPED}"):
        settings, picture, first = draw(line)
        assert settings["bits"] == "W4A8 sm16 split" and (picture == both).all(), line
    settings, picture, first = draw("--ptq --no-quant_act")
    assert settings["bits"] == "W4A32 split" and (picture == weights_only).all() and first.endswith(TOLD)


def test_each_setting_alone_calls_for_quant_act(draw):
    for line in ("--weight_bit 4", "--split", "--quant_mode qdiff"):
        assert draw(f"--ptq {line}")[0]["quant_act"] is False, line
        assert draw(f"--ptq {line} --quant_act")[0]["quant_act"] is True, line


def test_flags_of_activations_without_quant_act_are_refused(draw, capsys):
    for line in ("--act_bit 8", "--sm_abit 16", "--weight_bit 4 --act_bit 8"):
        with pytest.raises(SystemExit) as exit:
            draw(f"--ptq {line}")
        said = capsys.readouterr().err
        assert exit.value.code == 2 and "activations stay float" in said and "add --quant_act" in said, line


def test_published_files_are_read_by_the_same_rule(draw, both_formats):
    ours, published = both_formats
    settings, weights_only, first = draw(WEIGHTS_ONLY, published)
    assert settings["quant_act"] is False and first.endswith(TOLD)
    settings, both, first = draw(WITH_ACTIVATIONS, published)
    assert settings["quant_act"] is True and first.endswith(", W4A8 sm16 split")
    assert (weights_only == draw(WEIGHTS_ONLY, ours)[1]).all() and (both == draw(WITH_ACTIVATIONS, ours)[1]).all()
