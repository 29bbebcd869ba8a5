"""Small building blocks that every network of the model shares: schedules of noise, embeddings of time, layers."""

import math

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
    """Variances beta_t of the forward process, float64 [n_timestep].

    `linear` is linear in sqrt(beta), as all latent diffusion checkpoints were trained; `sqrt_linear` is linear in
    beta; `sqrt` its square root; `cosine` is Nichol & Dhariwal 2021, eq. 17. Raises ValueError on other names.
    """
    if n_timestep < 1:
        raise ValueError(f"n_timestep is {n_timestep}: a schedule needs at least one step")
    # On the CPU also while a model is built on the meta device: these are numbers of the config, not weights.
    options = {"dtype": torch.float64, "device": "cpu"}
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
    """Entries `t` [B] of a per-timestep table [T], shaped [B, 1, ...] to broadcast over `ndim` dimensions."""
    return table[t].reshape(-1, *[1] * (ndim - 1))


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of integer or fractional timesteps [B]: cosines first, then sines."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(timesteps.device)[None]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(function, args: tuple, enabled: bool):
    """`function(*args)`; when enabled and gradients are recorded, its activations are recomputed, not stored."""
    if enabled and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all parameters set to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels: int, eps: float = 1e-5, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm; statistics are accumulated in float32 by the kernels whatever the input's dtype.

    A group of one or two channels loses its level, and with it flat colour: narrow networks need fewer groups.
    """
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} groups: use a multiple of {groups}")
    return nn.GroupNorm(groups, channels, eps=eps)


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over 1, 2 or 3 spatial dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over 1, 2 or 3 spatial dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)
