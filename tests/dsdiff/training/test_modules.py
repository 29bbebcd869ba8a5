"""The Lightning modules around the models."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dsdiff.training.modules import (
    AutoencoderTraining,
    DiffusionTraining,
    ReaderTraining,
    training_module,
    with_scheduler,
)
from ldm.data.reader import ReaderDataset, ShapesReader
from ldm.util import instantiate_from_config

TINY = Path(__file__).parents[2] / "goldens/tiny_ldm.yaml"


def tiny_model(**params):
    config = OmegaConf.load(TINY).model
    config.params.update(params)
    return instantiate_from_config(config)


def quiet(module, monkeypatch):
    """Let a module's steps run without a trainer."""
    for name in ("log", "log_dict"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    return module


def test_each_model_has_its_module():
    model = tiny_model()
    assert isinstance(training_module(model, 1e-3), DiffusionTraining)
    assert isinstance(training_module(model.first_stage_model, 1e-3), AutoencoderTraining)
    assert isinstance(training_module(ShapesReader(width=8, features=8), 1e-3), ReaderTraining)
    with pytest.raises(ValueError, match="a Linear cannot be trained: use one of AutoencoderKL, LatentDiffusion"):
        training_module(torch.nn.Linear(1, 1), 1e-3)


def test_a_step_changes_the_unet_and_its_average_only(monkeypatch):
    model = tiny_model(use_ema=True)
    module = quiet(training_module(model, 0.1), monkeypatch).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    batch = {"moments": torch.randn(4, 8, 8, 8), model.cond_stage_key: list(torch.randn(4, 5, 24))}
    monkeypatch.setattr(model, "get_learned_conditioning", torch.stack)
    module.training_step(batch, 0).backward()
    optimizer.step()
    module.on_train_batch_end()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"model", "model_ema"}
    assert not model.first_stage_model.training


def test_a_reader_step_reaches_every_weight(monkeypatch):
    torch.manual_seed(0)
    module = quiet(training_module(ShapesReader(width=8, features=8), 4e-3), monkeypatch)
    batch = torch.utils.data.default_collate([ReaderDataset(2, resolution=64)[i] for i in range(2)])
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_checkpoints_have_the_names_of_the_model():
    module = training_module(ShapesReader(width=8, features=8), 1e-3)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == list(module.model.state_dict())
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def test_the_learning_rate_follows_the_config():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert with_scheduler(optimizer, None) == {"optimizer": optimizer}
    params = {"warm_up_steps": [4], "cycle_lengths": [100], "f_start": [0.0], "f_max": [1.0], "f_min": [0.0]}
    config = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
    schedule = with_scheduler(optimizer, config)["lr_scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert schedule["interval"] == "step" and rates == pytest.approx([0.0, 0.5, 1.0, 1.5, 1.92])
