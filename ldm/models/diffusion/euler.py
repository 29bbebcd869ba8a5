"""Euler's method for the probability flow, and its ancestral variant (Karras et al., arXiv:2206.00364).

Both work on z = x / alpha, to which noise of level s = sigma / alpha has been added, so that dz/ds = eps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.sampler import DrawNoise, KeepKnown, Sampler, Step, check_steps


class EulerSampler(Sampler):
    """Euler's method (algorithm 1 of Karras et al. without the second-order correction).

    The S times are spread evenly over N - 1 ... 0 and are fractional; s is interpolated linearly between timesteps. The
    walk starts from z = s_max x_T, and ends without noise.
    """

    name = "Euler"

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the S fractional times at which the model is called, descending."""
        self._eta(eta)
        return self._times(S).tolist()

    def _times(self, S: int) -> np.ndarray:
        N = self.model.num_timesteps
        check_steps(S, N)
        # One step starts at t = 0 if spread like the others, which would be from no noise.
        return np.linspace(0, N - 1, S)[::-1] if S > 1 else np.array([N - 1.0])

    def _prepare(self, S: int, eta: float) -> int:
        self.eta = eta
        times = self._times(S)
        alpha_bar = self.alphas_cumprod.double().numpy()
        levels = np.interp(times, np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
        self.model_times: list[float] = times.tolist()
        self.levels: list[float] = [*levels.tolist(), 0.0]
        return S

    def _skip(self, n_steps: int) -> None:
        self.model_times, self.levels = self.model_times[n_steps:], self.levels[n_steps:]

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        return x0 / self.levels[0] + noise  # which `_steps` multiplies by that level

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        s = self.levels
        z = s[0] * x
        for i in range(n_steps):
            alpha = (1 + s[i] ** 2) ** -0.5
            x = keep(alpha * z, alpha**2)
            z = x / alpha
            eps = predict_eps(x, self.model_times[i])
            pred_x0 = z - s[i] * eps
            s_down, s_up = self._split(s[i], s[i + 1])
            z = z + (s_down - s[i]) * eps
            if s_up > 0:
                z = z + s_up * noise()
            yield z * (1 + s[i + 1] ** 2) ** -0.5, pred_x0

    def _split(self, s: float, s_next: float) -> tuple[float, float]:
        """Return the noise level that the step goes down to, and the level of the fresh noise that it adds then."""
        return s_next, 0.0


class EulerAncestralSampler(EulerSampler):
    """Euler's method with fresh noise in each step: DDPM's ancestral sampling (Ho et al., arXiv:2006.11239), in s.

    The posterior of z at the next level has variance s_up² = s_next² (s² - s_next²) / s². The step goes down to s_down,
    with s_down² + s_up² = s_next². `eta` scales s_up: 0 is Euler's method, and 1, the default, is DDPM.
    """

    name = "Euler ancestral"
    default_eta = 1.0

    def _split(self, s: float, s_next: float) -> tuple[float, float]:
        s_up = self.eta * s_next * (1 - (s_next / s) ** 2) ** 0.5
        return (s_next**2 - s_up**2) ** 0.5, s_up
