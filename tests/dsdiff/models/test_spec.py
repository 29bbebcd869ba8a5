"""Which files a model is made of, and its facts, before its weights are read."""

import shutil

import pytest

from dsdiff.models import spec
from dsdiff.models.registry import EMBEDDED, STABLE_DIFFUSION
from dsdiff.options import ModelOptions


@pytest.fixture
def places(monkeypatch, tmp_path):
    """The files in which checkpoints are looked for, none of which exists."""
    files = {STABLE_DIFFUSION: (tmp_path / "sd.ckpt", tmp_path / "sd.safetensors")}
    files[EMBEDDED] = (tmp_path / "shapes.safetensors",)
    monkeypatch.setattr(spec, "CHECKPOINTS", files)
    return tmp_path


def choose(**files):
    return spec.find_model(ModelOptions(**files))


def test_stable_diffusion_if_it_is_there_else_the_embedded_model(places):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*sd\.ckpt and .*shapes\.safetensors"):
        choose()
    (places / "shapes.safetensors").touch()
    model = choose()
    assert str(model) == f"embedded shapes model ({places / 'shapes.safetensors'})"
    assert (model.height, model.width, model.channels, model.factor) == (256, 256, 4, 8)
    for name in ("sd.safetensors", "sd.ckpt"):
        (places / name).touch()
        model = choose()
        assert str(model) == f"Stable Diffusion v1 ({places / name})"
    assert (model.height, model.width, model.steps, model.scale) == (512, 512, 50, 7.5)


def test_config_and_checkpoint_find_each_other(places):
    for name in ("sd.safetensors", "shapes.safetensors", "own.ckpt"):
        (places / name).touch()
    assert choose(ckpt=places / "shapes.safetensors").config_path == EMBEDDED
    assert choose(ckpt=places / "own.ckpt").config_path == STABLE_DIFFUSION
    assert choose(config=STABLE_DIFFUSION).ckpt == places / "sd.safetensors"
    shutil.copy(EMBEDDED, places / "own.yaml")
    with pytest.raises(ValueError, match="comes with no checkpoint: give one with --ckpt"):
        choose(config=places / "own.yaml")


def test_prompts_for_calibration_are_found_beside_any_config(places):
    (places / "own.ckpt").touch()
    shutil.copy(EMBEDDED, places / "own.yaml")
    own = {"config": places / "own.yaml", "ckpt": places / "own.ckpt"}
    assert choose(**own).cali_prompts is None
    (places / "cali_prompts.txt").write_text("a cat\n")
    assert choose(**own).cali_prompts == places / "cali_prompts.txt"
    assert choose(ckpt=places / "own.ckpt").cali_prompts == STABLE_DIFFUSION.parent / "cali_prompts.txt"


def test_a_config_without_sampling_defaults_to_the_size_of_its_latents(places):
    (places / "own.ckpt").touch()
    (places / "own.yaml").write_text(STABLE_DIFFUSION.read_text().split("sampling:")[0])
    model = choose(config=places / "own.yaml", ckpt=places / "own.ckpt")
    assert (model.description, model.height, model.width, model.steps) == ("own", 512, 512, 50)


def test_the_blocks_of_a_unet_are_counted_and_a_config_without_one_is_named(places):
    (places / "own.ckpt").touch()
    text = STABLE_DIFFUSION.read_text()
    for old, new in (("num_res_blocks: 2\n        channel_mult", "channel_mult"), ("unet_config:", "u_net_config:")):
        assert old in text
        (places / "own.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"own\.yaml' has no UNet with channel_mult and num_res_blocks"):
            _ = choose(config=places / "own.yaml", ckpt=places / "own.ckpt").output_blocks
    assert choose(config=STABLE_DIFFUSION, ckpt=places / "own.ckpt").output_blocks == 12
