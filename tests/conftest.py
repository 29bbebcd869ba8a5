"""Fixtures that all tests share: seeded random numbers, and checkpoints with random weights for the commands."""

import pytest
import torch
from omegaconf import OmegaConf

from dsdiff.models.registry import EMBEDDED
from ldm.checkpoint import save_checkpoint
from ldm.util import instantiate_from_config
from tests.small_model import write_small_model


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers in each run, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def random_ckpt(tmp_path_factory):
    """Its path. Nothing in it is zero, so that prompt and noise reach the picture."""
    config = OmegaConf.load(EMBEDDED).model
    config.params.use_ema = False
    del config.params.cond_stage_config.params["tokenizer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = instantiate_from_config(config)
        for name, parameter in model.model.named_parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5 if "attn2" in name else 0.05)
        for parameter in model.cond_stage_model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(model, path)
    return path


@pytest.fixture(scope="session")
def small_model(make_small_model):
    """(config, checkpoint) of the same kind of model with a small UNet, random weights: its calibration is short."""
    return make_small_model("small")


@pytest.fixture(scope="session")
def make_small_model(tmp_path_factory):
    """(name, **more of the UNet's parameters) -> (config, checkpoint) of such a model."""
    return lambda name, **unet: write_small_model(tmp_path_factory.mktemp(name), name, unet)
