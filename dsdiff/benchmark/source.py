"""The model that a benchmark measures: its UNet, of a checkpoint or with random weights, and the inputs of a call."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.pipeline import CHECKPOINTS, EMBEDDED, STABLE_DIFFUSION, read_config
from ldm.checkpoint import averaged_weights, fill, read_weights
from ldm.util import instantiate_from_config

MODELS = {"embedded": EMBEDDED, "sd-v1": STABLE_DIFFUSION}  # name -> config
UNET_PREFIX = "model.diffusion_model."
CLIP_TOKENS = 77  # of a prompt, unless the config says otherwise
STEPS = 50  # of a picture, likewise


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where UNets come from. config: a yaml; params: its `model.params`. steps: calls that make a picture. ckpt: None
    for random weights. device: where the UNets will be."""

    config: Path
    params: Mapping[str, Any]
    steps: int
    ckpt: Path | None
    device: torch.device

    @classmethod
    def read(cls, config: Path, random_weights: bool, device: torch.device) -> "Source":
        """Raises OSError or ValueError for a config that is none, FileNotFoundError without a checkpoint."""
        params, steps = read_params(config), read_steps(config)
        ckpt = None if random_weights else existing(CHECKPOINTS[config])
        return cls(config=config, params=params, steps=steps, ckpt=ckpt, device=device)

    @property
    def unet_config(self) -> dict[str, Any]:
        return self.params["unet_config"]

    def unet(self) -> nn.Module:
        """The UNet in float32, read or drawn anew, the same each time."""
        config = self.unet_config
        unet = random_unet(config) if self.ckpt is None else trained_unet(config, self.ckpt)
        return unet.to(self.device).eval()

    def parameters(self) -> int:
        """How many the UNet has."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in instantiate_from_config(self.unet_config).parameters())

    def inputs(self) -> dict[str, Tensor]:
        return inputs_of(self.params, self.device)


def read_params(path: Path) -> dict[str, Any]:
    """The `model.params` of a config. Raises OSError or ValueError if they cannot be read or describe no UNet."""
    config = read_config(path)
    try:
        params = config["model"]["params"]
        if all(params[key] for key in ("image_size", "channels")) and params["unet_config"]["params"]["context_dim"]:
            return params
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"config {str(path)!r} describes no latent diffusion model with text: it needs model.params with image_size, "
        "channels and unet_config, and in that params.context_dim"
    )


def read_steps(path: Path) -> int:
    """The `sampling.steps` of a config. ValueError if it is no number of steps."""
    sampling = read_config(path).get("sampling") or {}
    steps = sampling.get("steps", STEPS) if isinstance(sampling, dict) else None
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"config {str(path)!r}: sampling.steps must be a whole number of 1 or more")
    return steps


def existing(places: tuple[Path, ...]) -> Path:
    """The first of the files that is there."""
    ckpt = next((path for path in places if path.is_file()), None)
    if ckpt is None:
        missing = " or ".join(repr(str(path)) for path in places)
        raise FileNotFoundError(f"no checkpoint at {missing}: put one there, or use --model sd-v1 --random_weights")
    return ckpt


def random_unet(config: dict[str, Any]) -> nn.Module:
    """A UNet with the weights that training begins with, noise in place of the zeros, which would end all signals."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = instantiate_from_config(config)
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return unet


def trained_unet(config: dict[str, Any], ckpt: Path) -> nn.Module:
    """The UNet alone, in float32, of a checkpoint. Errors are those of ldm.checkpoint."""
    tensors = read_weights(ckpt)
    tensors |= averaged_weights(tensors, str(ckpt))
    with torch.device("meta"):
        unet = instantiate_from_config(config)
    own = {name.removeprefix(UNET_PREFIX): tensors[name] for name in tensors if name.startswith(UNET_PREFIX)}
    fill(unet, own, str(ckpt))
    return unet.float()


def inputs_of(params: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Noise as arguments of a UNet call: latents [2, C, h, w], timesteps [2], context [2, tokens, context_dim]."""
    generator = torch.Generator().manual_seed(0)
    side = params["image_size"]
    encoder = (params.get("cond_stage_config") or {}).get("params") or {}
    width = params["unet_config"]["params"]["context_dim"]
    inputs = {
        "x": torch.randn(2, params["channels"], side, side, generator=generator),
        "timesteps": torch.full((2,), 500),
        "context": torch.randn(2, encoder.get("max_length", CLIP_TOKENS), width, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
