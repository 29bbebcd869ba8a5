"""DDIM: Denoising Diffusion Implicit Models (Song, Meng & Ermon, arXiv:2010.02502)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning, PredictEps, guided
from ldm.models.diffusion.sampler import (
    DrawNoise,
    Generators,
    KeepKnown,
    Sampler,
    Step,
    diffuse,
    draw_noise,
    keep_known,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)

logger = logging.getLogger(__name__)


class DDIMSampler(Sampler):
    """DDIM's update rule. `eta` 0 is deterministic; `eta` 1 puts back as much noise as DDPM."""

    name = "DDIM"
    default_eta = 0.0

    @classmethod
    def steps_taken(cls, S: int, num_timesteps: int) -> int:
        """Return S, or more where S does not divide `num_timesteps`; see `make_ddim_timesteps`."""
        return len(make_ddim_timesteps("uniform", S, num_timesteps))

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Compute the tables of a walk, ascending in t.

        They are `ddim_timesteps` int64 [n], `ddim_alphas` (alpha-bar_t) and `ddim_sqrt_one_minus_alphas` float32
        [n], `ddim_alphas_prev` and `ddim_sigmas` float64 [n], where n is `ddim_num_steps` or more, see
        `make_ddim_timesteps`. `verbose` logs the choice.
        """
        N = self.model.num_timesteps
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, N)
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev = make_ddim_sampling_parameters(
            self.alphas_cumprod, self.ddim_timesteps, ddim_eta
        )
        self.ddim_sqrt_one_minus_alphas = torch.from_numpy(np.sqrt(1 - self.ddim_alphas.numpy()))
        if verbose:
            n = len(self.ddim_timesteps)
            logger.info("%s: %d %s steps, eta %g", self.name, n, ddim_discretize, ddim_eta)

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the times at which the model is called: the timesteps of the tables, descending."""
        self._eta(eta)
        return make_ddim_timesteps("uniform", S, self.model.num_timesteps)[::-1].tolist()

    def _prepare(self, S: int, eta: float) -> int:
        self.make_schedule(S, ddim_eta=eta, verbose=False)
        return len(self.ddim_timesteps)

    def _skip(self, n_steps: int) -> None:
        """Do nothing: `_steps` finds the last steps in the tables itself."""

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        return diffuse(x0, noise, float(self.ddim_alphas[n_steps - 1]))

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        for i in reversed(range(n_steps)):
            x = keep(x, float(self.ddim_alphas[i]))
            eps = predict_eps(x, int(self.ddim_timesteps[i]))
            x, pred_x0 = self._update(x, eps, i, noise)
            yield x, pred_x0

    def _update(self, x: Tensor, eps: Tensor, i: int, noise: DrawNoise) -> Step:
        """Go from timestep i of the tables to the one before (DDIM eq. 12)."""
        a_t, a_prev = float(self.ddim_alphas[i]), float(self.ddim_alphas_prev[i])
        sigma = float(self.ddim_sigmas[i])
        pred_x0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5  # "predicted x_0"
        direction = (1 - a_prev - sigma**2) ** 0.5 * eps  # "direction pointing to x_t"
        random = sigma * noise() if sigma > 0 else 0.0  # "random noise"
        return a_prev**0.5 * pred_x0 + direction + random, pred_x0

    @torch.no_grad()
    def stochastic_encode(self, x0: Tensor, t: Tensor | int, noise: Tensor | None = None) -> Tensor:
        """Diffuse x0 [B, C, H, W] to step `t` of the tables, an int or [B], in 0..n-1 (DDIM eq. 4).

        `noise` has the shape of x0; it is drawn from torch's global generator if None. Needs `make_schedule` first.
        """
        n = self._n_made()
        t = torch.as_tensor(t, device="cpu").expand(x0.shape[0])
        if t.min() < 0 or t.max() >= n:
            raise ValueError(f"step to encode to must be in 0..{n - 1}, got {t.tolist()}")
        if noise is None:
            noise = draw_noise(x0.shape, None, x0.device)
        signal = self.ddim_alphas.sqrt()[t].view(-1, 1, 1, 1).to(x0.device)
        spread = self.ddim_sqrt_one_minus_alphas[t].view(-1, 1, 1, 1).to(x0.device)
        return signal * x0 + spread * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        *,
        generator: Generators = None,
        verbose: bool = True,
    ) -> Tensor:
        """Walk the last `t_start` steps of the tables from x_latent [B, C, H, W]; `t_start` in 1..n.

        Arguments as in `sample`. Needs `make_schedule` first. Returns [B, C, H, W].
        """
        n = self._n_made()
        if not 1 <= t_start <= n:
            raise ValueError(f"t_start must be in 1..{n}, the steps of the schedule, got {t_start}")
        x, scale = x_latent, unconditional_guidance_scale
        predict_eps = guided(self.model, x.shape[0], cond, unconditional_conditioning, scale)
        noise = partial(draw_noise, x.shape, generator, x.device)
        steps = self._steps(predict_eps, x, t_start, noise, keep_known(None, None, x.shape, noise))
        *_, (x, _pred_x0) = self._progress(steps, t_start, verbose)
        return x

    def _n_made(self) -> int:
        """Return the number of steps in the tables. Raise ValueError if there are none yet."""
        if not hasattr(self, "ddim_timesteps"):
            raise ValueError("no schedule yet: call make_schedule(steps) first")
        return len(self.ddim_timesteps)
