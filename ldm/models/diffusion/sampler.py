"""The common parts of all samplers: step tables, noise, and the walk from x_T to x_0.

A sampler subclasses `Sampler` and gives its update rule as a generator (`_steps`). It calls a function
`predict_eps(x, t)` that already contains the guidance, and never sees the conditioning.

CompVis keeps `make_ddim_timesteps` and `make_ddim_sampling_parameters` among the UNet's utilities; here they are
beside their only users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import (
    ALL_STEPS,
    Conditioning,
    Interval,
    LimitedGuidance,
    PredictEps,
    guided,
    guided_steps,
)

Generators = torch.Generator | Sequence[torch.Generator] | None
DrawNoise = Callable[[], Tensor]  # () -> standard normal noise [B, C, H, W]
KeepKnown = Callable[[Tensor, float], Tensor]  # (x_t, alpha_bar_t) -> x_t with its known region restored
Step = tuple[Tensor, Tensor]  # (x after the step, the x_0 it was heading for)


# --- schedule tables ---------------------------------------------------------------------------------------


def check_steps(S: int, num_timesteps: int) -> None:
    """Raise ValueError unless S is a whole number of steps in 1..num_timesteps."""
    if not isinstance(S, int | np.integer) or isinstance(S, bool) or not 1 <= S <= num_timesteps:
        raise ValueError(f"number of sampling steps must be a whole number in 1..{num_timesteps}, got {S!r}")


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta, the share of DDPM's noise put back at each step, lies in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")


def make_ddim_timesteps(ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int) -> np.ndarray:
    """Return the training timesteps that a DDIM walk visits, ascending, int64.

    "uniform" strides by N // S. An S that does not divide N gives more steps than S, up to twice as many (N = 1000:
    340 gives 500, and 501..999 give 1000). "quad" spaces the square roots evenly over the first 80 % of the N steps.
    Steps count from 1, as the released checkpoints expect; a last step beyond N - 1 is clamped to it.
    """
    S, N = num_ddim_timesteps, num_ddpm_timesteps
    check_steps(S, N)
    if ddim_discr_method == "uniform":
        steps = np.arange(0, N, N // S)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(0.8 * N), S) ** 2).astype(np.int64)
    else:
        raise ValueError(f'DDIM discretisation must be "uniform" or "quad", got {ddim_discr_method!r}')
    return np.minimum(steps + 1, N - 1)


def make_ddim_sampling_parameters(
    alphacums: Tensor, ddim_timesteps: np.ndarray, eta: float
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return (sigmas, alphas, alphas_prev) at `ddim_timesteps`; these "alphas" are the papers' alpha-bar.

    `alphacums` is the float32 CPU tensor [N] of all alpha-bar. The walk ends at alphacums[0], not at 1.
    `eta` in [0, 1] scales the noise put back at each step: 0 is DDIM, 1 is DDPM (DDIM eq. 16).
    """
    check_eta(eta)
    alpha_bar = alphacums.numpy()
    alphas = alpha_bar[ddim_timesteps]
    # Python floats make this float64. A table of one step contains none of them and stays float32, as published.
    alphas_prev = np.asarray([alpha_bar[0], *alphas[:-1].tolist()])
    # The reciprocal is rounded to float32 and the roots are NumPy's, which gives the published tables bit for bit.
    sigmas = eta * np.sqrt((1 - alphas_prev) * (1 / (1 - alphas)) * (1 - alphas / alphas_prev))
    return torch.from_numpy(sigmas), torch.from_numpy(alphas), alphas_prev


# --- noise -------------------------------------------------------------------------------------------------


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per picture, so that its noise depends on its own seed and not on its batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(batch_shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Draw standard normal noise [B, C, H, W] on the CPU, so that every device gets the same, and move it to `device`.

    `generator`: one for the whole batch, a sequence with one per picture, or None for torch's global one.
    Raises ValueError if a sequence does not have B generators.
    """
    randn = partial(torch.randn, dtype=torch.float32, device="cpu")
    if generator is None or isinstance(generator, torch.Generator):
        return randn(*batch_shape, generator=generator).to(device)
    if len(generator) != batch_shape[0]:
        raise ValueError(f"got {len(generator)} generators for {batch_shape[0]} picture(s): give one for each")
    return torch.stack([randn(*batch_shape[1:], generator=g) for g in generator]).to(device)


def diffuse(x0: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """Return x_t of x_0 and its noise (DDPM eq. 4)."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def keep_known(mask: Tensor | None, x0: Tensor | None, batch_shape: Sequence[int], noise: DrawNoise) -> KeepKnown:
    """Return the function that restores the known region before each step of inpainting.

    Where `mask` is 1 it replaces x_t by x0 at the noise level of x_t; elsewhere it leaves x_t. Without a mask it
    leaves x_t everywhere. Raises ValueError unless both are None, or both broadcast to `batch_shape` [B, C, H, W].
    """
    if mask is None and x0 is None:
        return lambda x, alpha_bar: x
    if mask is None or x0 is None:
        raise ValueError("inpainting needs both mask and x0, got only one of them")
    for name, value in (("mask", mask), ("x0", x0)):
        wanted = batch_shape[-value.ndim :] if value.ndim else ()
        if value.ndim > 4 or any(n not in (1, m) for n, m in zip(value.shape, wanted, strict=False)):
            raise ValueError(f"{name} of shape {tuple(value.shape)} does not broadcast to {tuple(batch_shape)}")

    return lambda x, alpha_bar: mask * diffuse(x0, noise(), alpha_bar) + (1 - mask) * x


# --- starting from latents ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Init:
    """Latents from which a walk starts, in the middle of its schedule.

    x0: the latents [B, C, H, W], or broadcastable to it. strength: the share of the steps that are taken, in (0, 1],
    see `steps_from`. drawn: for inpainting, 1 where latents are drawn anew and 0 where they stay x0, broadcastable to
    [B, C, H, W]; None draws all of them.
    """

    x0: Tensor
    strength: float
    drawn: Tensor | None = None


def steps_from(n_steps: int, strength: float) -> int:
    """Return how many of n steps are taken at a strength: the last int(n strength), as in diffusers.

    Raises ValueError for a strength outside of (0, 1], and for one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and 1 at most, got {strength}")
    taken = min(int(n_steps * strength), n_steps)
    if taken == 0:
        raise ValueError(f"strength {strength:g} takes none of {n_steps} steps: use {1 / n_steps:.2g} or more")
    return taken


def put_back(init: Init, noise: Tensor) -> KeepKnown:
    """Return the function that restores x0, at the noise level of x_t and with this `noise`, where nothing is drawn."""
    drawn = init.drawn
    if drawn is None:
        return lambda x, alpha_bar: x
    return lambda x, alpha_bar: drawn * x + (1 - drawn) * diffuse(init.x0, noise, alpha_bar)


# --- the walk ----------------------------------------------------------------------------------------------


def check_batch_shape(batch_size: int, shape: Sequence[int], x_T: Tensor | None) -> tuple[int, ...]:
    """Return (B, C, H, W). Raise ValueError unless all are 1 or more, and x_T, if given, has this shape."""
    batch_shape = (batch_size, *shape)
    if len(batch_shape) != 4 or not all(isinstance(n, int) and n >= 1 for n in batch_shape):
        raise ValueError(f"batch_size must be 1 or more and shape (C, H, W), got {batch_size} and {tuple(shape)}")
    if x_T is not None and tuple(x_T.shape) != batch_shape:
        raise ValueError(f"x_T must have shape {batch_shape}, got {tuple(x_T.shape)}")
    return batch_shape


def check_finite(latents: Tensor, where: str) -> None:
    """Raise ValueError, which begins with `where`, for latents with NaN or infinity: their picture would be black."""
    if not bool(latents.sum(dtype=torch.float32).isfinite()):
        raise ValueError(f"{where}: latents are NaN or infinite: use a smaller scale of guidance, or full precision")


class Sampler:
    """A sampler without its update rule, which subclasses give in `schedule`, `_prepare` and `_steps`.

    `model` needs `apply_model(x [B, C, H, W], t [B], conditioning) -> eps`, `alphas_cumprod` [N],
    `num_timesteps` (N) and `device`.
    """

    name = "sampler"
    default_eta: float | None = None  # None: eta has no effect, and must be 0 or None

    def __init__(self, model: Any):
        self.model = model
        self.alphas_cumprod = model.alphas_cumprod.detach().float().cpu()

    @classmethod
    def steps_taken(cls, S: int, num_timesteps: int) -> int:
        """Return how many steps `sample(S)` takes of a model with `num_timesteps`. Raise ValueError for a bad S."""
        check_steps(S, num_timesteps)
        return S

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the times at which `sample(S, ..., eta=eta)` calls the model, in the order of the calls.

        Times are int where the model gets int64, float where it gets float32. Raises ValueError as `sample` does.
        """
        raise NotImplementedError

    def schedule_from(self, S: int, eta: float | None = None, strength: float = 1.0) -> list[int | float]:
        """Return the times of `schedule` that a walk at a strength takes, see `Init`."""
        times = self.schedule(S, eta)
        return times[len(times) - steps_from(len(times), strength) :]

    def _eta(self, eta: float | None) -> float:
        """Return eta, or the sampler's default for None. Raise ValueError for one out of range or without effect."""
        if eta is None:
            return self.default_eta or 0.0
        if self.default_eta is None and eta != 0:
            raise ValueError(
                f"{self.name} takes no eta: eta must be 0, got {eta} (DDIM, Euler ancestral and TCD take one)"
            )
        check_eta(eta)
        return eta

    def _prepare(self, S: int, eta: float) -> int:
        """Compute the tables for S steps; return how many steps the walk takes."""
        raise NotImplementedError

    def _skip(self, n_steps: int) -> None:
        """Leave the first `n_steps` steps out of the tables."""
        raise NotImplementedError

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        """Return x from which `_steps` walks the last `n_steps` steps, of x_0 and its noise."""
        raise NotImplementedError

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        """Walk the last `n_steps` steps of the prepared tables from x, and yield after each."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        *,
        eta: float | None = None,
        x_T: Tensor | None = None,
        verbose: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        guidance_interval: Interval = ALL_STEPS,
        generator: Generators = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        init: Init | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps, S in 1..N.

        conditioning, unconditional_conditioning: tensor [B, T, D], or a list or dict of tensors, with one row per
            picture. Guidance with `unconditional_guidance_scale` applies if both are given and the scale is not 1.
        guidance_interval: (start, stop), shares of the steps between which guidance applies, see `guided_steps`.
        eta: share of noise that each step puts back, in [0, 1]. None is the sampler's `default_eta`; samplers that have
            none take only 0.
        x_T: standard normal noise [B, C, H, W] to start from; drawn from `generator` if None.
        generator: the source of noise. A sequence of one CPU generator per picture (`seeded_generators`) makes each
            picture independent of its batch; None is torch's global generator.
        mask, x0: for inpainting, both broadcastable to [B, C, H, W]; x0 is kept where mask is 1. CompVis's way: the
            noise of what is kept is fresh in each step.
        init: latents to start from in the middle of the schedule, see `Init`; `mask` and `x0` are not for it.
        callback(i), img_callback(pred_x0, i): called once per step, i = 0, 1, ...
        verbose: show a progress bar.

        Returns (samples [B, C, H, W], {"x_inter": [...], "pred_x0": [...]}). The lists of x and predicted x_0 hold
        x_T, the first step, and every `log_every_t`-th step counted back from the end. Raises ValueError for bad
        input, and in a step whose latents are not all finite.
        """
        batch_shape = check_batch_shape(batch_size, shape, x_T)
        if log_every_t < 1:
            raise ValueError(f"log_every_t must be 1 or more, got {log_every_t}")
        if init is not None and (mask is not None or x0 is not None):
            raise ValueError("give either init, which has a mask of its own, or mask and x0")
        n_all = self._prepare(S, self._eta(eta))
        n_steps = n_all if init is None else steps_from(n_all, init.strength)
        scale = unconditional_guidance_scale
        predict_eps = LimitedGuidance(
            inside=guided(self.model, batch_size, conditioning, unconditional_conditioning, scale),
            outside=guided(self.model, batch_size, conditioning, None, scale),
            steps=guided_steps(n_steps, guidance_interval),
        )
        noise = partial(draw_noise, batch_shape, generator, self.model.device)
        keep = keep_known(mask, x0, batch_shape, noise)
        x = noise() if x_T is None else x_T.to(self.model.device)
        if init is not None:
            keep = put_back(init, x)
            self._skip(n_all - n_steps)
            if init.drawn is None or n_steps < n_all:  # else what is drawn begins as noise alone
                x = self._noised(init.x0, x, n_steps)

        inter: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = self._steps(predict_eps, x, n_steps, noise, keep)
        for i, (x, pred_x0) in enumerate(self._progress(steps, n_steps, verbose)):
            check_finite(x, f"{self.name}, step {i + 1} of {n_steps}")
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if i == 0 or (n_steps - 1 - i) % log_every_t == 0:
                inter["x_inter"].append(x)
                inter["pred_x0"].append(pred_x0)
            predict_eps.step = i + 1  # the walk goes on only when the next step is asked for
        return (x if init is None else put_back(init, x)(x, 1.0)), inter

    def _progress(self, steps: Iterator[Step], n_steps: int, verbose: bool) -> Iterator[Step]:
        """Yield the steps and show a bar, which stays on the screen unless it is inside another bar."""
        return iter(tqdm(steps, self.name, n_steps, leave=None, unit="step", disable=not verbose))
