"""The Lightning modules around the models."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dsdiff.training.modules import (
    AutoencoderTraining,
    ContrastTraining,
    DiffusionTraining,
    ReaderTraining,
    training_module,
    with_scheduler,
)
from ldm.data.contrasts import ContrastDataset
from ldm.data.reader import ReaderDataset, ShapesReader
from ldm.models.clip import Contrast
from ldm.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests/goldens/tiny_ldm.yaml"


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


def test_only_a_diffusion_model_is_compiled(monkeypatch):
    """Its weights keep their names, so that checkpoints of compiled and other runs are alike."""
    model = tiny_model()
    with pytest.raises(ValueError, match="compile is for a LatentDiffusion: nothing of this AutoencoderKL"):
        training_module(model.first_stage_model, 1e-3).compile_network()
    module = quiet(training_module(model, 1e-3), monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *args, **kwargs: 1 / 0)
    module.compile_network()
    assert model.model.diffusion_model._compiled_call_impl is not None
    assert all("_orig_mod" not in name for name in model.state_dict())


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


def small_clip():
    config = OmegaConf.load(ROOT / "configs/shapes/clip.yaml").model
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.params.text_config.params.tokenizer = str(ROOT / "models/ldm/shapes/tokenizer")
    config.params.text_config.params.text_config.update(tower)
    config.params.image_config.params.update({"vision_config": tower, "trunk": {"width": 8, "features": 8}})
    return instantiate_from_config(config)


def test_a_step_of_contrast_reaches_every_weight_that_captions_need(monkeypatch):
    module = quiet(training_module(small_clip(), 1e-3), monkeypatch)
    assert isinstance(module, ContrastTraining)
    batch = torch.utils.data.default_collate([ContrastDataset(3, contrasts=2)[i] for i in range(3)])
    module.training_step(batch, 0).backward()
    idle = {name for name, p in module.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert idle == set()
    decayed = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    shapes = {tuple(p.shape) for p in decayed}
    assert all(p.ndim >= 2 for p in decayed) and (624, 16) not in shapes and (64, 16) not in shapes


def test_contrast_is_measured_by_kind(monkeypatch):
    module, logged = training_module(small_clip(), 1e-3), {}
    monkeypatch.setattr(module, "log", lambda name, value, **kwargs: logged.update({name: float(value)}))
    monkeypatch.setattr(module, "log_dict", lambda values, **kwargs: logged.update(values))
    cosines = {"of_others": torch.eye(2), "of_wrong": torch.tensor([[0.5, 2.0], [0.0, 2.0]])}
    contrast = Contrast(**cosines, pictures=torch.eye(2), captions=torch.eye(2))
    monkeypatch.setattr(module, "contrast", lambda batch: contrast)
    module.validation_step({"kinds": [("order", "order"), ("size", "order")]}, 0)
    assert logged["val/told_apart/order"] == pytest.approx(2 / 3) and logged["val/told_apart/size"] == 0
    assert logged["val/told_apart"] == 0.5 and logged["val/retrieved"] == 1


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
