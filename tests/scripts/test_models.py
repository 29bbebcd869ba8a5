"""Models in every form that people have them: each command takes them, and they draw the same picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dsdiff import DrawOptions, ModelOptions, find_model
from dsdiff.models.registry import TOKENIZER
from dsdiff.pipeline import load
from ldm.models.diffusion.sampler import seeded_generators
from scripts import calibrate, export, txt2img

DRAW = ["--prompt", "a large red circle", "--ddim_steps", "2", "--scale", "3", "--n_samples", "1", "--n_iter", "1"]
DRAW += ["--H", "32", "--W", "48", "--device", "cpu", "--vae", "float32", "--precision", "full", "--skip_grid"]


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    """The small model as export.py writes it for diffusers."""
    config, ckpt = small_model
    path = tmp_path_factory.mktemp("diffusers") / "new" / "small"
    export.main(["--diffusers", str(path), "--config", str(config), "--ckpt", str(ckpt), "--tokenizer", str(TOKENIZER)])
    return path


@pytest.fixture
def draw(tmp_path):
    """draw(*flags) -> the picture."""

    def call(*flags):
        outdir = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        txt2img.main([*DRAW, "--outdir", str(outdir), *map(str, flags)])
        return np.asarray(Image.open(outdir / "samples/00000.png")).astype(int)

    return call


@pytest.fixture
def refused(capsys):
    """refused(command, *flags) -> the one line on stderr."""

    def call(command, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command.main([str(flag) for flag in flags])
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and lines[-1].startswith("error: "), lines
        return lines[-1]

    return call


def given(small_model, ckpt=None):
    config, own = small_model
    return "--config", config, "--ckpt", ckpt or own, "--tokenizer", TOKENIZER


def test_a_folder_and_a_file_draw_the_same(small_model, folder, draw):
    wanted = draw(*given(small_model))
    assert wanted.std() > 0
    assert np.array_equal(draw("--ckpt", folder), wanted)


def test_a_folder_is_told_in_pictures_and_records(folder, draw, tmp_path):
    draw("--ckpt", folder)
    (outdir,) = tmp_path.iterdir()
    texts = Image.open(outdir / "samples/00000.png").text
    assert "Model: small" in texts["parameters"] and json.loads(texts["dsdiff"])["ckpt"] == "small"
    assert str(folder) in (outdir / "settings.yaml").read_text()
    spec = find_model(ModelOptions(ckpt=folder))
    assert str(spec) == f"small ({folder})" and len(spec.hashes["ckpt_sha256"]) == 64


@pytest.mark.slow
def test_diffusers_draws_with_the_folder_what_we_draw(folder):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours = load(folder, device="cpu")
    options = DrawOptions(sampler="ddim", steps=10, scale=4.0, height=64, width=64, precision="full", vae="float32")
    prompt, noise = "a blue ring", torch.randn(1, 4, 8, 8, generator=seeded_generators([7])[0])
    wanted = theirs(
        prompt, num_inference_steps=10, guidance_scale=4.0, height=64, width=64, latents=noise, output_type="latent"
    )
    latents = ours.sample([prompt], [7], ours.resolve(options))
    assert (latents - wanted.images).abs().max() < 1e-3 * wanted.images.abs().max()


def test_a_folder_is_calibrated_and_packed(folder, draw, tmp_path):
    cali = ["--preset", "fast", "--rounding", "nearest", "--cali_n", "2", "--cali_st", "2", "--ddim_steps", "2"]
    calibrate.main(["--ckpt", str(folder), "--outdir", str(tmp_path / "cali"), *cali, "--weight_bit", "8"])
    file = tmp_path / "cali" / "cali.safetensors"
    bundle = tmp_path / "bundle.safetensors"
    export.main([str(bundle), "--ckpt", str(folder), "--cali_ckpt", str(file), "--vae_pictures", "0"])
    alone, parts = draw("--ckpt", bundle), draw("--ckpt", folder, "--ptq", "--cali_ckpt", file)
    assert np.abs(alone - parts).max() <= 2
    assert np.abs(parts - draw("--ckpt", folder)).max() < 60


def test_another_autoencoder(small_model, folder, draw, tmp_path):
    wanted = draw(*given(small_model))
    assert np.array_equal(draw(*given(small_model), "--vae_ckpt", folder / "vae"), wanted)
    path = tmp_path / "vae.safetensors"
    state = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: weight * 1.1 if "conv_out" in name else weight for name, weight in state.items()}, path)
    other = draw(*given(small_model), "--vae_ckpt", path)
    assert not np.array_equal(other, wanted)
    assert np.array_equal(draw("--ckpt", folder, "--vae_ckpt", path), other)
    with_it = find_model(ModelOptions(ckpt=folder, vae_ckpt=path))
    assert len({*with_it.hashes.values()}) == 3 and str(path) in str(with_it)


def test_the_prediction_is_read_beside_and_in_the_file(small_model, draw, tmp_path):
    _, ckpt = small_model
    eps, state = draw(*given(small_model)), load_file(ckpt)
    save_file(state, tmp_path / "header.safetensors", metadata={"modelspec.prediction_type": "v"})
    v = draw(*given(small_model, tmp_path / "header.safetensors"))
    assert not np.array_equal(v, eps)
    torch.save(state, tmp_path / "beside.ckpt")
    (tmp_path / "beside.yaml").write_text("model: {target: os.abort, params: {parameterization: v}}")
    assert np.array_equal(draw(*given(small_model, tmp_path / "beside.ckpt")), v)
    save_file(state | {"v_pred": torch.zeros(0)}, tmp_path / "mark.safetensors")
    assert np.array_equal(draw(*given(small_model, tmp_path / "mark.safetensors")), v)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(state | marks, tmp_path / "zero.safetensors")
    assert not np.array_equal(draw(*given(small_model, tmp_path / "zero.safetensors")), v)
    save_file(state, tmp_path / "eps.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    assert np.array_equal(draw(*given(small_model, tmp_path / "eps.safetensors")), eps)


def test_a_model_that_predicts_v_is_exported_as_such(small_model, draw, tmp_path):
    _, ckpt = small_model
    save_file(load_file(ckpt), tmp_path / "v.safetensors", metadata={"modelspec.prediction_type": "v"})
    flags = [str(flag) for flag in given(small_model, tmp_path / "v.safetensors")]
    export.main(["--diffusers", str(tmp_path / "v"), *flags])
    scheduler = json.loads((tmp_path / "v/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert np.array_equal(draw("--ckpt", tmp_path / "v"), draw(*flags))


def test_what_cannot_be_is_refused(small_model, folder, refused, tmp_path):
    shutil.copytree(folder, tmp_path / "xl")
    (tmp_path / "xl/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (tmp_path / "empty").mkdir()
    save_file(load_file(small_model[1]), tmp_path / "x0.safetensors", metadata={"modelspec.prediction_type": "sample"})
    out = tmp_path / "out"
    for command, flags, what in (
        (txt2img, ["--ckpt", tmp_path / "xl"], "Stable Diffusion XL"),
        (calibrate, ["--ckpt", tmp_path / "xl"], "Stable Diffusion XL"),
        (txt2img, ["--ckpt", tmp_path / "empty"], "no folder as diffusers saves it"),
        (txt2img, ["--ckpt", folder, "--config", small_model[0]], "--config has no effect"),
        (txt2img, ["--ckpt", folder, "--vae_ckpt", tmp_path / "none.ckpt"], "no autoencoder at"),
        (txt2img, given(small_model, tmp_path / "x0.safetensors"), "predicts 'sample'"),
        (export, ["--diffusers", folder], "is there already"),
        (export, ["--diffusers", out, "--cali_ckpt", "x"], "--cali_ckpt has no effect with --diffusers"),
        (export, ["--diffusers", out, tmp_path / "b.safetensors"], "and not both"),
        (export, [], "give the FILE to write, or --diffusers DIR"),
    ):
        more = {txt2img: [*DRAW, "--outdir", out], calibrate: ["--outdir", out], export: []}[command]
        assert what in refused(command, *flags, *more), flags
        assert not out.exists(), flags


def test_a_quantized_model_is_not_exported_for_diffusers(refused, tmp_path):
    bundle = tmp_path / "bundle.safetensors"
    export.main([str(bundle), "--vae_pictures", "0"])
    assert "holds a quantized model" in refused(export, "--diffusers", tmp_path / "out", "--ckpt", bundle)
    assert "--vae_ckpt has no effect" in refused(
        txt2img, *DRAW, "--ckpt", bundle, "--vae_ckpt", bundle, "--outdir", tmp_path / "out"
    )
    assert not Path(tmp_path / "out").exists()
