"""--lora of the commands: drawing, resuming, calibrating with a LoRA and exporting that; what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dsdiff.models.registry import CHECKPOINTS, EMBEDDED, LORA_CALI_CKPTS
from qdiff.checkpoint import read_cali_header
from scripts import calibrate, export, txt2img

SMALL = ["--H", "32", "--W", "32", "--ddim_steps", "2", "--device", "cpu", "--n_iter", "1", "--n_samples", "1"]
(LCM_CALI_CKPT,) = LORA_CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]]
LAYERS = {  # a layer of each network
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v": (32, 32),
    "lora_unet_conv_in": (32, 4, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (512, 128),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("lora"), torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        tensors = {}
        for stem, shape in LAYERS.items():
            tensors[f"{stem}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator) * 0.2
            tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * len(shape[2:]), generator=generator)
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "one.safetensors", folder / "two.safetensors"


@pytest.fixture
def draw(small_model, tmp_path):
    """draw(name, *flags) -> the folder of a small picture."""

    def call(name, *flags):
        config, ckpt = small_model
        model = [] if "--ckpt" in flags else ["--config", config, "--ckpt", ckpt]
        txt2img.main(
            [str(flag) for flag in (*model, "--outdir", tmp_path / name, *SMALL, "--prompt", "a ring", *flags)]
        )
        return tmp_path / name

    return call


def picture(folder):
    return Image.open(folder / "samples/00000.png")


def pixels(folder):
    return np.asarray(picture(folder)).astype(int)


def error_of(capsys, call, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        call(*args)
    assert leaving.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_pictures_and_settings_tell_the_loras_and_a_resumed_run_has_the_same(draw, files, capsys):
    plain, folder = draw("plain"), draw("lora", "--lora", f"{files[0]}:0.5", "--lora", files[1])
    assert np.abs(pixels(plain) - pixels(folder)).mean() > 1
    written = yaml.safe_load((folder / "settings.yaml").read_text())["lora"]
    assert [(entry["name"], entry["scale"]) for entry in written] == [
        ("one.safetensors", 0.5),
        ("two.safetensors", 1.0),
    ]
    text = picture(folder).text
    assert json.loads(text["dsdiff"])["lora"] == written
    assert "LoRA: " in text["parameters"] and "one.safetensors:0.5 two.safetensors:1" in text["parameters"]
    assert str(files[0].parent) not in "".join(text.values())
    for other in ([], ["--lora", f"{files[0]}:0.4", "--lora", files[1]], ["--lora", files[1]]):
        assert "other settings: lora" in error_of(capsys, draw, "lora", "--resume", *other)
    draw("lora", "--resume", "--lora", f"{files[0]}:0.5", "--lora", files[1])
    # A run of an older version, which knew no LoRAs, goes on without one.
    settings = yaml.safe_load((plain / "settings.yaml").read_text())
    del settings["lora"]
    (plain / "settings.yaml").write_text(yaml.safe_dump(settings))
    draw("plain", "--resume")


def test_what_cannot_be_is_refused_before_anything_is_written(draw, files, tmp_path, capsys):
    stem = "lora_unet_conv_in"
    nan = {
        f"{stem}.lora_down.weight": torch.full((2, 4, 3, 3), float("nan")),
        f"{stem}.lora_up.weight": torch.ones(32, 2),
    }
    save_file(nan, tmp_path / "nan.safetensors")
    save_file({"lora_te2_a.alpha": torch.ones(1)}, tmp_path / "xl.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for text, words in (
        (tmp_path / "nan.safetensors", "lora_unet_conv_in (down) holds NaN"),
        (tmp_path / "xl.safetensors", "it looks like one of Stable Diffusion XL"),
        (tmp_path / "text.safetensors", "text.safetensors"),
        (tmp_path / "none.safetensors", "is not there"),
        ("C:\\none.safetensors", "C:\\\\none.safetensors"),
        (f"{files[0]}:nan", "it must be a finite number"),
    ):
        assert words in error_of(capsys, draw, "refused", "--lora", text), text
        assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_calibration_with_a_lora_is_drawn_and_exported_with_it(draw, small_model, files, tmp_path, capsys):
    config, ckpt = small_model
    model = ["--config", config, "--ckpt", ckpt]
    (tmp_path / "prompts.txt").write_text("a ring\n")
    flags = ["--prompts", tmp_path / "prompts.txt", "--cali_st", "1", "--cali_n", "2", "--quant_mode", "linear"]
    flags += ["--quant_act", "--ddim_steps", "2", "--device", "cpu"]
    lora = ["--lora", f"{files[0]}:0.5"]

    def run(command, *args):
        command.main([str(arg) for arg in args])

    run(calibrate, *model, *flags, *lora, "--outdir", tmp_path / "cali")
    cali = tmp_path / "cali/cali.safetensors"
    header = read_cali_header(cali)
    assert [(entry["name"], entry["scale"]) for entry in header.source["lora"]] == [("one.safetensors", 0.5)]
    run(calibrate, *model, *flags, "--outdir", tmp_path / "plain")
    plain = read_cali_header(tmp_path / "plain/cali.safetensors")
    assert "lora" not in plain.source and plain.source["fingerprint"] != header.source["fingerprint"]
    assert plain.calibration["data_sha256"] != header.calibration["data_sha256"]
    assert "no place" in error_of(capsys, run, calibrate, *model, *flags, *lora, "--format", "qdiff")

    quantized = ["--ptq", "--cali_ckpt", cali, "--engine", "simulate"]
    for other in ([], ["--lora", files[0]], ["--lora", f"{files[1]}:0.5"]):
        assert "was made with LoRA one.safetensors merged at scale 0.5" in error_of(
            capsys, draw, "no", *quantized, *other
        )
    merged = draw("merged", *quantized, *lora)
    assert np.abs(pixels(draw("float", *lora)) - pixels(merged)).mean() < 20
    both = draw("both", *quantized, "--lora", files[1], *lora)
    written = yaml.safe_load((both / "settings.yaml").read_text())["lora"]
    assert [entry["name"] for entry in written] == ["one.safetensors", "two.safetensors"], "the merged one is the first"
    assert np.abs(pixels(both) - pixels(merged)).mean() > 1

    bundle, given = tmp_path / "bundle.safetensors", [*model, "--cali_ckpt", cali, "--vae_pictures", "0"]
    assert "was made with LoRA" in error_of(capsys, run, export, bundle, *given)
    assert "two.safetensors" in error_of(capsys, run, export, bundle, *given, *lora, "--lora", files[1])
    run(export, bundle, *given, *lora)
    alone = draw("bundle", "--ckpt", bundle, "--engine", "simulate", "--vae", "float32")
    without = draw("without", "--ptq", "--cali_ckpt", tmp_path / "plain/cali.safetensors", "--engine", "simulate")
    assert np.abs(pixels(without) - pixels(merged)).mean() > 8
    assert np.abs(pixels(alone) - pixels(merged)).mean() < 10, "its text encoder is float16"
    assert "already" in error_of(capsys, draw, "twice", "--ckpt", bundle, *lora)
    more = draw("more", "--ckpt", bundle, "--engine", "simulate", "--vae", "float32", "--lora", files[1])
    assert np.abs(pixels(more) - pixels(both)).mean() < 5


def test_the_lora_that_comes_with_the_model_is_exported_with_its_own_calibration(tmp_path):
    file, lora = tmp_path / "lcm.safetensors", LCM_CALI_CKPT.with_name("lcm.safetensors")
    flags = ["--config", EMBEDDED, "--lora", lora, "--vae_pictures", 0]
    export.main([str(flag) for flag in (file, *flags)])
    (record,) = read_cali_header(file).source["lora"]
    assert record["name"] == "lcm.safetensors" and record["scale"] == 1
    assert read_cali_header(file).source["lora"] == read_cali_header(LCM_CALI_CKPT).source["lora"]
    with pytest.raises(SystemExit):  # of other bits there is no such calibration
        export.main([str(flag) for flag in (tmp_path / "w8.safetensors", *flags, "--weight_bit", 8)])
    assert not (tmp_path / "w8.safetensors").exists()
