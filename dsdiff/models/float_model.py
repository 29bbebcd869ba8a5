"""Read a float model: a LatentDiffusion with the weights of a checkpoint."""

from pathlib import Path

import torch

from dsdiff.models.spec import ModelSpec
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import load_model_from_config


def load_float_model(spec: ModelSpec, device: torch.device, tokenizer: Path | None = None) -> LatentDiffusion:
    """Return the model of a checkpoint on a device, ready to draw.

    tokenizer: the folder of the tokenizer's files (None: beside the checkpoint). Raises ValueError or FileNotFoundError
    for files that are missing, damaged, or of another model.
    """
    model = load_model_from_config(spec.config, spec.ckpt, device, tokenizer=tokenizer, vae_ckpt=spec.vae_ckpt)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"config {str(spec.config_path)!r} describes a {type(model).__name__}, no LatentDiffusion")
    getattr(model.cond_stage_model, "tokenizer", None)  # read now: what it lacks is told before all else
    return model
