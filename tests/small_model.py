"""A model of the embedded one's kind with a small UNet and random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dsdiff.models.registry import EMBEDDED
from ldm.checkpoint import save_checkpoint
from ldm.util import instantiate_from_config


def write_small_model(folder: Path, name: str, unet: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write a config and a checkpoint of the embedded model's kind to `folder`; return them. unet: more parameters."""
    config = OmegaConf.load(EMBEDDED)
    small = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
    config.model.params.unet_config.params |= small | dict(unet)
    config.sampling |= {"height": 128, "width": 128}
    OmegaConf.save(config, folder / f"{name}.yaml")
    built = OmegaConf.create(OmegaConf.to_container(config.model))
    built.params.use_ema = False
    del built.params.cond_stage_config.params["tokenizer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = instantiate_from_config(built)
        for parameter in [*model.model.parameters(), *model.cond_stage_model.parameters()]:
            if not parameter.any() or parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(model, folder / f"{name}.safetensors")
    return folder / f"{name}.yaml", folder / f"{name}.safetensors"
