"""Training, interrupting, resuming and exporting, on networks of a few channels."""

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.data import shapes
from ldm.data.latents import CachedLatents
from ldm.util import load_model_from_config
from scripts import train

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_groups": 2,
}
SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 8, "split": "train", "resolution": 32}}
SINGLE_THREADED = os.environ | {"OMP_NUM_THREADS": "1"}
TRAINER = {
    "max_steps": 2,
    "precision": "32-true",
    "gradient_clip_val": 1.0,
    "checkpoint_every": 2,
    "log_images_every": 2,
}


def autoencoder(lossconfig):
    params = {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": lossconfig}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Config files of a tiny autoencoder and a tiny model on its latents; the present folder is empty."""
    root = train.__file__.rsplit("/scripts/", 1)[0]
    monkeypatch.chdir(tmp_path)
    first = {
        "model": {"base_learning_rate": 1e-3} | autoencoder({"target": "ldm.modules.losses.ReconstructionLoss"}),
        "data": {
            "batch_size": 4,
            "num_workers": 0,
            "train": {"target": "ldm.data.crops.RandomCrops", "params": {"size": 16, "dataset": SHAPES}},
            "validation": SHAPES,
        },
        "trainer": TRAINER | {"export": "autoencoder.safetensors"},
    }
    second = OmegaConf.to_container(OmegaConf.load(f"{root}/configs/shapes/txt2img.yaml"))
    params = second["model"]["params"]
    params["first_stage_config"] = autoencoder({"target": "torch.nn.Identity"})
    params["unet_config"]["params"] |= {"model_channels": 8, "channel_mult": [1, 1], "num_heads": 2, "context_dim": 16}
    params["unet_config"]["params"] |= {"attention_resolutions": [1], "norm_groups": 2}
    params["cond_stage_config"]["params"]["tokenizer"] = f"{root}/models/ldm/shapes/tokenizer"
    params["cond_stage_config"]["params"]["text_config"] |= {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    latents = {
        "dataset": SHAPES,
        "autoencoder": "autoencoder.yaml",
        "ckpt": "autoencoder.safetensors",
        "folder": "latents",
    }
    second["data"] = {
        "batch_size": 4,
        "num_workers": 0,
        "train": {"target": "ldm.data.latents.CachedLatents", "params": latents},
        "validation": SHAPES,
    }
    second["trainer"] = TRAINER | {
        "export": "model.safetensors",
        "init_from": {"first_stage_model.": "autoencoder.safetensors"},
    }
    OmegaConf.save(first, "autoencoder.yaml")
    OmegaConf.save(second, "txt2img.yaml")
    return tmp_path


def test_both_stages_end_in_a_model_that_loads(configs):
    train.main(["--config", "autoencoder.yaml", "--device", "cpu"])
    train.main(["--config", "txt2img.yaml", "--device", "cpu"])
    model = load_model_from_config(OmegaConf.load("txt2img.yaml"), "model.safetensors")
    stored = load_file("autoencoder.safetensors")
    weight = model.first_stage_model.encoder.conv_in.weight
    assert torch.equal(weight.half(), stored["encoder.conv_in.weight"])
    assert not any(name.startswith(("model_ema.", "cond_stage_ema.")) for name in load_file("model.safetensors"))
    grids = sorted(path.name for path in (configs / "runs" / "txt2img" / "samples").iterdir())
    assert grids == ["000002-samples.png"]
    with safe_open("model.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "2"


def test_a_run_goes_on_from_its_last_checkpoint(configs):
    arguments = ["--config", "autoencoder.yaml", "--device", "cpu", "--outdir", "run"]
    train.main([*arguments, "--max_steps", "3", "--export", ""])
    assert not (configs / "autoencoder.safetensors").exists()
    first = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert first["global_step"] == 3  # although checkpoints are written every second step
    train.main([*arguments, "--max_steps", "3", "--export", "again.safetensors"])
    again = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.equal(first["state_dict"][name], again["state_dict"][name]) for name in first["state_dict"])
    train.main([*arguments, "--max_steps", "4"])
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    steps = [state["step"].item() for state in last["optimizer_states"][0]["state"].values()]
    assert set(steps) == {4.0}  # Adam's count went on as well
    moved = [(last["state_dict"][name] - first["state_dict"][name]).abs().max() for name in first["state_dict"]]
    assert 0 < max(moved) < 0.01  # one step of Adam away, not begun anew
    assert [path.name for path in (configs / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_restart_begins_anew_and_replaces_the_old_run(configs):
    arguments = ["--config", "autoencoder.yaml", "--device", "cpu", "--outdir", "run"]
    train.main([*arguments, "--max_steps", "4", "--export", "old.safetensors"])
    train.main([*arguments, "--restart", "--seed", "1", "--max_steps", "2", "--export", "new.safetensors"])
    train.main([*arguments, "--export_only", "--export", "exported.safetensors"])
    new, exported = load_file("new.safetensors"), load_file("exported.safetensors")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert all(torch.equal(new[name], exported[name]) for name in new)


def test_weights_of_a_run_can_be_exported_later(configs):
    arguments = ["--config", "autoencoder.yaml", "--device", "cpu"]
    train.main([*arguments, "--export", "at_end.safetensors"])
    train.main([*arguments, "--export_only", "--export", "later.safetensors"])
    at_end, later = load_file("at_end.safetensors"), load_file("later.safetensors")
    assert all(torch.equal(at_end[name], later[name]) for name in at_end)


def test_latents_are_encoded_once_and_depend_on_the_weights(configs):
    train.main(["--config", "autoencoder.yaml", "--device", "cpu"])
    arguments = {"dataset": SHAPES, "autoencoder": "autoencoder.yaml", "ckpt": "autoencoder.safetensors"}
    data = CachedLatents(**arguments, folder="latents")
    (cache,) = (configs / "latents").glob("*.npy")
    written = cache.stat().st_mtime_ns
    assert len(data) == 8 and data[0]["moments"].shape == (8, 16, 16)
    again = CachedLatents(**arguments, folder="latents")
    assert cache.stat().st_mtime_ns == written and again[3]["caption"] == data[3]["caption"]
    train.main(["--config", "autoencoder.yaml", "--device", "cpu", "--restart", "--seed", "1"])
    CachedLatents(**arguments, folder="latents")
    assert len(list((configs / "latents").glob("*.npy"))) == 2


def test_a_changed_renderer_and_an_interrupt_leave_no_stale_latents(configs, monkeypatch):
    train.main(["--config", "autoencoder.yaml", "--device", "cpu"])
    arguments = {"dataset": SHAPES, "autoencoder": "autoencoder.yaml", "ckpt": "autoencoder.safetensors"}
    CachedLatents(**arguments, folder="latents")
    render = shapes.render
    monkeypatch.setattr(shapes, "render", lambda scene, resolution: render(scene, resolution).rotate(90))
    monkeypatch.setattr(CachedLatents, "_write_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CachedLatents(**arguments, folder="latents")
    assert len(list((configs / "latents").iterdir())) == 2  # of the first: moments and captions


def interrupted(self, file, model, batch_size):
    file.write_bytes(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--config", "partial.yaml"], "no data, trainer"),
        (["--config", "txt2img.yaml", "--device", "cpu"], "autoencoder.safetensors"),
        (["--config", "autoencoder.yaml", "--device", "tpu"], "tpu"),
        (["--config", "autoencoder.yaml", "--max_steps", "0"], "max_steps"),
        (["--config", "autoencoder.yaml", "--export", "weights.ckpt"], ".safetensors"),
        (["--config", "autoencoder.yaml", "--export_only"], "train first"),
        (["--config", "autoencoder.yaml", "--export_only", "--export", ""], "--export FILE"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(configs, capsys, arguments, message):
    (configs / "broken.yaml").write_text("model: [")
    (configs / "partial.yaml").write_text("model: {}")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("error:") == 1
    assert "Traceback" not in error and not (configs / "runs" / "autoencoder").exists()


def test_two_processes_share_the_weights(configs):
    train.main(["--config", "autoencoder.yaml", "--device", "cpu"])
    script = train.__file__
    arguments = ["--config", "txt2img.yaml", "--device", "cpu", "--devices", "2", "--export", "two.safetensors"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=SINGLE_THREADED)
    assert done.returncode == 0, done.stderr[-2000:]
    load_model_from_config(OmegaConf.load("txt2img.yaml"), "two.safetensors")
    state = torch.load("runs/txt2img/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2


def test_batches_that_cannot_be_shared_are_refused(configs, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", "autoencoder.yaml", "--device", "cpu", "--devices", "3"])
    assert stop.value.code == 2 and "batches of 4" in capsys.readouterr().err
