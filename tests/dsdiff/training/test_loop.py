"""Training, interrupting, resuming and exporting, on networks of a few channels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from dsdiff.training.loop import initialise, run
from dsdiff.training.options import InitialWeights, TrainingOptions
from ldm.data.reader import ShapesReader
from ldm.lora import layer_shapes, read_lora
from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from ldm.util import instantiate_from_config, load_model_from_config

ROOT = Path(__file__).resolve().parents[3]
COMMAND = ROOT / "scripts/train.py"


def trained(config, **options):
    """Run a training on the CPU; return the file of exported weights."""
    return run(TrainingOptions(config=Path(config), device="cpu", **options))


def last_checkpoint(folder):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_both_stages_end_in_a_model_that_loads(configs):
    assert trained("autoencoder.yaml") == Path("autoencoder.safetensors")
    assert trained("txt2img.yaml") == Path("model.safetensors")
    model = load_model_from_config(OmegaConf.load("txt2img.yaml"), "model.safetensors")
    stored = load_file("autoencoder.safetensors")
    weight = model.first_stage_model.encoder.conv_in.weight
    assert torch.equal(weight.half(), stored["encoder.conv_in.weight"])
    assert not any(name.startswith(("model_ema.", "cond_stage_ema.")) for name in load_file("model.safetensors"))
    grids = sorted(path.name for path in (configs / "runs" / "txt2img" / "samples").iterdir())
    assert grids == ["000002-samples.png"]
    with safe_open("model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"config": "txt2img.yaml", "steps": "2"}.items()
    # The checkpoint of the run has the same names, and the averages that were exported.
    again = load_model_from_config(OmegaConf.load("txt2img.yaml"), "runs/txt2img/checkpoints/last.ckpt")
    for name, value in again.model.state_dict().items():
        assert torch.equal(value.half(), model.model.state_dict()[name].half()), name


@pytest.mark.slow
def test_tokens_are_merged_while_a_model_is_trained(configs):
    trained("autoencoder.yaml")
    content = OmegaConf.load("txt2img.yaml")
    merge = {"ratio": 0.5, "merge_kv": True, "proportional": True}
    weights = {}
    for name, given in (("whole", None), ("merged", merge), ("nothing", merge | {"ratio": 0.0})):
        content.trainer.merge = given
        OmegaConf.save(content, f"{name}.yaml")
        # Layers that begin with zeros hide attention from the loss in the first steps.
        trained(f"{name}.yaml", export=f"{name}.safetensors", max_steps=5)
        weights[name] = last_checkpoint(f"runs/{name}")["state_dict"]["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(weights["whole"], weights["nothing"])
    assert not torch.equal(weights["whole"], weights["merged"])


def test_the_reader_is_trained_and_loads(configs):
    trained("reader.yaml")
    reader = ShapesReader.from_file("reader.safetensors", width=8, features=8)
    assert reader.features(torch.zeros(1, 3, 64, 64)).shape == (1, 8)


def test_a_tiny_decoder_is_trained_on_the_latents_of_an_autoencoder(configs):
    content = OmegaConf.load("autoencoder.yaml")
    content.model.params.ddconfig.ch_mult = [1, 1, 1, 1]
    OmegaConf.save(content, "autoencoder.yaml")
    trained("autoencoder.yaml")
    content.model = {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.tiny_distillation.TinyDistillation",
        "params": {"autoencoder": "autoencoder.yaml", "ckpt": "autoencoder.safetensors", "width": 8},
    }
    content.trainer.export = "tiny.safetensors"
    OmegaConf.save(content, "tiny.yaml")
    before = load_file("autoencoder.safetensors")
    trained("tiny.yaml")
    decoder = read_tiny_decoder("tiny.safetensors")
    assert {name.split(".")[0] for name in load_file("tiny.safetensors")} == {"decoder"}
    model = instantiate_from_config(OmegaConf.load("tiny.yaml").model)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.encode(pictures, sample=False)
    with torch.no_grad():
        assert latents.shape == (2, 4, 4, 4) and decoder(latents).shape == pictures.shape
    learnt = last_checkpoint("runs/tiny")["state_dict"]
    torch.manual_seed(0)
    start = TinyDecoder(width=8).state_dict()
    assert any(not torch.equal(learnt[f"decoder.{name}"], value) for name, value in start.items())
    after = model.autoencoder.state_dict()
    assert all(torch.equal(after[name].half(), value) for name, value in before.items())  # the teacher stays as it was


@pytest.mark.slow
def test_a_lora_of_few_steps_is_distilled_and_drawn_with(configs):
    """Also after an interruption, with the schedule of the config."""
    trained("autoencoder.yaml")
    trained("txt2img.yaml")
    content = OmegaConf.merge(
        OmegaConf.load(ROOT / "configs/shapes/lcm.yaml"), {"data": OmegaConf.load("txt2img.yaml").data}
    )
    content.model.params |= {"teacher": "txt2img.yaml", "ckpt": "model.safetensors", "rank": 2}
    content.data.train.params |= {"ckpt": "model.safetensors", "prefix": "first_stage_model."}
    content.trainer |= {"max_steps": 3, "precision": "32-true", "checkpoint_every": 1, "log_images_every": 1}
    content.trainer.export = "lcm.safetensors"
    OmegaConf.save(content, "lcm.yaml")
    before = load_file("model.safetensors")
    assert trained("lcm.yaml", max_steps=1, export="first.safetensors") == Path("first.safetensors")
    first = last_checkpoint("runs/lcm")["state_dict"]
    assert {name.split(".")[0] for name in first} == {"factors", "average"}
    assert trained("lcm.yaml") == Path("lcm.safetensors")
    state = last_checkpoint("runs/lcm")
    assert state["global_step"] == 3 and state["state_dict"]["average.num_updates"] == 3
    moved = max((state["state_dict"][name] - first[name]).abs().max() for name in first if name.startswith("factors"))
    assert 0 < moved < 0.01  # some steps of Adam away, not begun anew
    assert (configs / "runs/lcm/samples/000003-samples.png").exists()
    assert all(torch.equal(value, before[name]) for name, value in load_file("model.safetensors").items())
    model = load_model_from_config(OmegaConf.load("txt2img.yaml"), "model.safetensors")
    changes = read_lora("lcm.safetensors", layer_shapes(model.model.diffusion_model, model.cond_stage_model))
    with safe_open("lcm.safetensors", "pt") as file:
        assert file.metadata().items() >= {"config": "lcm.yaml", "steps": "3"}.items()
    for name, change in changes.items():
        key = name.removeprefix("model.diffusion_model.").replace(".", "_")
        average = {part: state["state_dict"][f"average.{key}{part}"] for part in ("down", "up")}
        assert change.strength == 1 and torch.equal(change.up, average["up"].half()), name
        assert torch.equal(change.down, average["down"].half()), name


def test_a_run_goes_on_from_its_last_checkpoint(configs):
    options = {"outdir": Path("run")}
    assert trained("autoencoder.yaml", max_steps=3, export="", **options) is None
    assert not (configs / "autoencoder.safetensors").exists()
    first = last_checkpoint("run")
    assert first["global_step"] == 3  # although checkpoints are written every second step
    trained("autoencoder.yaml", max_steps=3, export="again.safetensors", **options)
    again = last_checkpoint("run")
    assert all(torch.equal(first["state_dict"][name], again["state_dict"][name]) for name in first["state_dict"])
    trained("autoencoder.yaml", max_steps=4, **options)
    last = last_checkpoint("run")
    assert last["global_step"] == 4
    steps = [state["step"].item() for state in last["optimizer_states"][0]["state"].values()]
    assert set(steps) == {4.0}  # Adam's count went on as well
    moved = [(last["state_dict"][name] - first["state_dict"][name]).abs().max() for name in first["state_dict"]]
    assert 0 < max(moved) < 0.01  # one step of Adam away, not begun anew
    assert [path.name for path in (configs / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_run_of_another_model_or_other_data_is_not_gone_on_with(configs):
    options = {"outdir": Path("run")}
    trained("autoencoder.yaml", max_steps=2, export="", **options)
    content = OmegaConf.load("autoencoder.yaml")
    content.data.batch_size *= 2
    OmegaConf.update(content, "model.params.monitor", "val/kl_loss", force_add=True)
    OmegaConf.save(content, "other.yaml")
    with pytest.raises(ValueError, match=r"the run in 'run' has another model, data\.batch_size than 'other\.yaml'"):
        trained("other.yaml", max_steps=4, **options)
    assert last_checkpoint("run")["global_step"] == 2
    trained("other.yaml", max_steps=1, restart=True, export="", **options)
    assert last_checkpoint("run")["global_step"] == 1


def test_restart_begins_anew_and_replaces_the_old_run(configs):
    options = {"outdir": Path("run")}
    trained("autoencoder.yaml", max_steps=4, export="old.safetensors", **options)
    trained("autoencoder.yaml", restart=True, seed=1, max_steps=2, export="new.safetensors", **options)
    trained("autoencoder.yaml", export_only=True, export="exported.safetensors", **options)
    new, exported = load_file("new.safetensors"), load_file("exported.safetensors")
    assert last_checkpoint("run")["global_step"] == 2
    assert all(torch.equal(new[name], exported[name]) for name in new)


def test_weights_of_a_run_can_be_exported_later(configs):
    trained("autoencoder.yaml", export="at_end.safetensors")
    trained("autoencoder.yaml", export_only=True, export="later.safetensors")
    at_end, later = load_file("at_end.safetensors"), load_file("later.safetensors")
    assert all(torch.equal(at_end[name], later[name]) for name in at_end)


def test_a_part_is_filled_by_its_whole_file_only(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    weights = {name: value.detach().clone() + 1 for name, value in model["a"].state_dict().items()}
    torch.save(weights, tmp_path / "a.pt")
    initialise(model, {"a.": InitialWeights(file=tmp_path / "a.pt")})
    assert torch.equal(model["a"].weight, weights["weight"])
    more = {f"inner.{name}": value + 1 for name, value in weights.items()} | {"other": torch.zeros(1)}
    torch.save(more, tmp_path / "whole.pt")
    initialise(model, {"b.": InitialWeights(file=tmp_path / "whole.pt", prefix="inner.")})
    assert torch.equal(model["b"].weight, weights["weight"] + 1)
    for bad in ({"weight": weights["weight"]}, weights | {"more": torch.zeros(1)}):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"bad\.pt does not fit the part 'a\.' of ModuleDict"):
            initialise(model, {"a.": InitialWeights(file=tmp_path / "bad.pt")})


@pytest.mark.slow
def test_two_processes_share_the_weights(configs):
    """All in processes of their own: what this one has imported must not matter to them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (["autoencoder.yaml"], ["txt2img.yaml", "--devices", "2", "--export", "two.safetensors"]):
        line = [sys.executable, COMMAND, "--device", "cpu", "--config", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    model = load_model_from_config(OmegaConf.load("txt2img.yaml"), "two.safetensors")
    state = last_checkpoint("runs/txt2img")
    assert state["global_step"] == 2
    weight = state["state_dict"]["first_stage_model.encoder.conv_in.weight"]
    assert torch.equal(model.first_stage_model.encoder.conv_in.weight, weight)
