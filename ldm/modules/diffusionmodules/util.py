"""Small parts that the networks share: noise schedules, time embeddings, layers."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.utils.checkpoint

NORM_GROUPS = 32


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> torch.Tensor:
    """Return the variances beta_t of the forward process, float64 [n_timestep].

    `linear` is linear in sqrt(beta), with which all latent diffusion checkpoints were trained. `sqrt_linear` is linear
    in beta, and `sqrt` is the square root of that. `cosine` is eq. 17 of Nichol & Dhariwal 2021. Raises ValueError
    for other names, and for fewer timesteps than 1.
    """
    if n_timestep < 1:
        raise ValueError(f"n_timestep is {n_timestep}: a schedule needs at least one step")
    # Always on the CPU, even if a model is built on the meta device: these numbers come from the config, not a file.
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, n_timestep, **options) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, n_timestep, **options)
    if schedule == "sqrt":
        return torch.linspace(linear_start, linear_end, n_timestep, **options) ** 0.5
    if schedule == "cosine":
        steps = torch.arange(n_timestep + 1, **options) / n_timestep + cosine_s
        alphas_cumprod = torch.cos(steps / (1 + cosine_s) * math.pi / 2) ** 2
        alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
        return betas.clamp(0, 0.999)
    raise ValueError(f"beta schedule {schedule!r} is unknown: use linear, sqrt_linear, sqrt or cosine")


def extract_into_tensor(table: torch.Tensor, t: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return the entries `t` [B] of a table [T] over timesteps, as [B, 1, ...] with `ndim` dimensions."""
    return table[t].reshape(-1, *[1] * (ndim - 1))


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """Return the sinusoidal embedding [B, dim] of integer or fractional timesteps [B]: cosines, then sines."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    args = timesteps[:, None].float() * freqs[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def guidance_embedding(scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Return LCM's embedding [B, dim] of guidance scales [B], 1 being none: sines of 1000 (scale - 1), then cosines."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=scale.device) / (half - 1))
    args = 1000 * (scale[:, None].float() - 1) * freqs[None]
    embedding = torch.cat([torch.sin(args), torch.cos(args)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(function: Callable[..., torch.Tensor], args: tuple, enabled: bool) -> torch.Tensor:
    """Return `function(*args)`. If enabled, the backward pass recomputes its activations instead of storing them."""
    if enabled and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that a residual block starts as the identity; return the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels: int, eps: float = 1e-5, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """Return a GroupNorm, whose statistics torch accumulates in float32 for every dtype.

    Normalising groups of one or two channels removes their level, and with it flat colours: narrow networks need
    fewer groups. Raises ValueError unless the channels can be divided into the groups.
    """
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} groups: use a multiple of {groups}")
    return nn.GroupNorm(groups, channels, eps=eps)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a convolution over 1, 2 or 3 spatial dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return an average pooling over 1, 2 or 3 spatial dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)
