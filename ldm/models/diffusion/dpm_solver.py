"""DPM-Solver++(2M): fast guided sampling of diffusion models (Lu et al., arXiv:2211.01095)."""

from __future__ import annotations

from collections.abc import Iterator
from math import expm1

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import (
    DrawNoise,
    KeepKnown,
    PredictEps,
    Sampler,
    Step,
    check_deterministic,
    check_steps,
)

FEW_STEPS = 15  # below this, the last step falls back to first order, which is steadier for large steps


class DPMSolverSampler(Sampler):
    """Second-order multistep solver for the predicted x_0, in equal steps of time from t = 1 to t = 1/N.

    Times are fractional. The N steps of training are t = 1/N ... 1, log alpha is interpolated linearly between
    them, and the model is called at (t - 1/N) * N.
    """

    name = "DPM-Solver++"

    def schedule(self, S: int, eta: float = 0.0) -> list[int | float]:
        """Return the S fractional times at which the model is called, descending."""
        return self._model_times(self._times(S, eta))[:-1].tolist()

    def _times(self, S: int, eta: float) -> np.ndarray:
        """Return t at the ends of the S steps [S + 1], descending in 1 ... 1/N."""
        N = self.model.num_timesteps
        check_steps(S, N)
        check_deterministic(self.name, eta)
        return np.linspace(1, 1 / N, S + 1)

    def _model_times(self, t: np.ndarray) -> np.ndarray:
        """Return the model's times in 0 ... N - 1 for t in 1/N ... 1."""
        N = self.model.num_timesteps
        return (t - 1 / N) * N

    def _prepare(self, S: int, eta: float) -> int:
        N = self.model.num_timesteps
        t = self._times(S, eta)
        log_alpha_bar = np.log(self.alphas_cumprod.double().numpy())
        log_alpha = np.interp(t, np.arange(1, N + 1) / N, log_alpha_bar / 2)
        self.model_times = self._model_times(t)
        self.alphas = np.exp(log_alpha)
        self.sigmas = np.sqrt(-np.expm1(2 * log_alpha))  # alpha² + sigma² = 1
        self.lambdas = log_alpha - np.log(self.sigmas)  # half the log signal-to-noise ratio
        return S

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        """Go from t_{i-1} to t_i (algorithm 2)."""
        alpha, sigma, lam = self.alphas.tolist(), self.sigmas.tolist(), self.lambdas.tolist()
        x0 = x0_before = h_before = None
        for i in range(1, n_steps + 1):
            x = keep(x, alpha[i - 1] ** 2)
            eps = predict_eps(x, float(self.model_times[i - 1]))
            x0, x0_before = (x - sigma[i - 1] * eps) / alpha[i - 1], x0
            h = lam[i] - lam[i - 1]
            if i == 1 or (i == n_steps < FEW_STEPS):
                D = x0
            else:
                r = h_before / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * expm1(-h) * D
            h_before = h
            yield x, x0
