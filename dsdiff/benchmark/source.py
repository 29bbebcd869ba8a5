"""The model that a benchmark measures: its UNet, from a checkpoint or with random weights, and the inputs of a call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdiff.models.configs import read_config
from dsdiff.models.registry import CHECKPOINTS
from ldm.checkpoint import averaged_weights, fill, read_weights
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config, without_weights

UNET_PREFIX = "model.diffusion_model."
CLIP_TOKENS = 77  # of a prompt, unless the config says otherwise
STEPS = 50  # of a picture, unless the config says otherwise
GUIDED = 2  # the batch of a call with guidance, for one picture
TIMESTEP = 500  # of a measured call


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where UNets come from, and the inputs of a call.

    config: a yaml. params: its `model.params`. steps: UNet calls that make a picture. ckpt: the checkpoint, None for
    random weights. device: where the UNets will be. batch: the samples of a call. latents: height and width of its
    latents.
    """

    config: Path
    params: Mapping[str, Any]
    steps: int
    ckpt: Path | None
    device: torch.device
    batch: int
    latents: tuple[int, int]

    @classmethod
    def read(
        cls,
        config: Path,
        random_weights: bool,
        device: torch.device,
        *,
        batch: int = GUIDED,
        latents: Sequence[int] | None = None,
    ) -> "Source":
        """Read a config. latents: height and width; None takes the model's. Raises OSError or ValueError if the config
        describes no model with text, or for latents that its UNet cannot take, and FileNotFoundError if weights are
        wanted and there is no checkpoint."""
        content = read_config(config)
        params, steps = params_of(content, config), steps_of(content, config)
        ckpt = None if random_weights else existing(CHECKPOINTS[config])
        height, width = latents or (params["image_size"], params["image_size"])
        _check_latents(height, width, params["unet_config"]["params"])
        size = (height, width)
        return cls(config=config, params=params, steps=steps, ckpt=ckpt, device=device, batch=batch, latents=size)

    @property
    def unet_config(self) -> dict[str, Any]:
        return self.params["unet_config"]

    def unet(self) -> UNetModel:
        """Return a new UNet in float32, with the same weights each time."""
        config = self.unet_config
        unet = random_unet(config) if self.ckpt is None else trained_unet(config, self.ckpt)
        return unet.to(self.device).eval()

    def parameters(self) -> int:
        """Return how many parameters the UNet has."""
        with without_weights():
            return sum(parameter.numel() for parameter in instantiate_from_config(self.unet_config).parameters())

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a call, see `inputs_of`."""
        return inputs_of(self.params, self.device, batch=self.batch, latents=self.latents)


def params_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the `model.params` of a config that was read from `path`. Raises ValueError if they describe no UNet."""
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


def steps_of(config: Mapping[str, Any], path: Path) -> int:
    """Return the `sampling.steps` of a config that was read from `path`. Raises ValueError for anything but a count."""
    sampling = config.get("sampling") or {}
    steps = sampling.get("steps", STEPS) if isinstance(sampling, dict) else None
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"config {str(path)!r}: sampling.steps must be a whole number of 1 or more")
    return steps


def existing(places: tuple[Path, ...]) -> Path:
    """Return the first of these files that exists. Raises FileNotFoundError if none does."""
    ckpt = next((path for path in places if path.is_file()), None)
    if ckpt is None:
        missing = " or ".join(repr(str(path)) for path in places)
        raise FileNotFoundError(f"no checkpoint at {missing}: put one there, or use --model sd-v1 --random_weights")
    return ckpt


def random_unet(config: dict[str, Any]) -> UNetModel:
    """Return a UNet with initial weights, the same each time.

    Weights that training initialises to zero are replaced by noise, since they would make all outputs zero.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = instantiate_from_config(config)
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return unet


def trained_unet(config: dict[str, Any], ckpt: Path) -> UNetModel:
    """Return the UNet of a checkpoint, in float32; nothing else is built. Errors are those of ldm.checkpoint."""
    tensors = read_weights(ckpt)
    tensors |= averaged_weights(tensors, str(ckpt))
    with without_weights():
        unet = instantiate_from_config(config)
    own = {name.removeprefix(UNET_PREFIX): tensors[name] for name in tensors if name.startswith(UNET_PREFIX)}
    fill(unet, own, str(ckpt))
    return unet.float()


def inputs_of(
    params: Mapping[str, Any],
    device: torch.device,
    *,
    batch: int = GUIDED,
    latents: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return noise as the arguments of a UNet call, from a config's `model.params`.

    latents: their height h and width w; None takes the model's. Returns x [batch, C, h, w], timesteps [batch], context
    [batch, tokens, context_dim].
    """
    generator = torch.Generator().manual_seed(0)
    size = latents or (params["image_size"], params["image_size"])
    encoder = (params.get("cond_stage_config") or {}).get("params") or {}
    width = params["unet_config"]["params"]["context_dim"]
    inputs = {
        "x": torch.randn(batch, params["channels"], *size, generator=generator),
        "timesteps": torch.full((batch,), TIMESTEP),
        "context": torch.randn(batch, encoder.get("max_length", CLIP_TOKENS), width, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _check_latents(height: int, width: int, unet: Mapping[str, Any]) -> None:
    """Raise ValueError for sides that the UNet, which halves them at each level, cannot put together again."""
    step = 2 ** (len(unet.get("channel_mult", (1, 2, 4, 8))) - 1)
    if min(height, width) < 1 or height % step or width % step:
        raise ValueError(f"latents {height}x{width} do not fit this UNet: both sides must be multiples of {step}")
