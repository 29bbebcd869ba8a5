"""DPM-Solver++(2M): fast guided sampling of diffusion models (Lu et al., arXiv:2211.01095).

The solver is the same for two sets of times: equal steps of time, and the noise levels of Karras et al.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import expm1

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.sampler import (
    DrawNoise,
    KeepKnown,
    Sampler,
    Step,
    check_steps,
    diffuse,
)

FEW_STEPS = 15  # below this, the last step falls back to first order, which is steadier for large steps
RHO = 7  # exponent of Karras et al.: the larger, the shorter the steps at little noise


class DPMSolverSampler(Sampler):
    """Second-order multistep solver for the predicted x_0, in equal steps of time from t = 1 to t = 1/N.

    Times are fractional. The N steps of training are t = 1/N ... 1, log alpha is interpolated linearly between
    them, and the model is called at (t - 1/N) * N.
    """

    name = "DPM-Solver++"

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the S fractional times at which the model is called, descending."""
        self._eta(eta)
        return self._model_times(self._times(S))[:-1].tolist()

    def _times(self, S: int) -> np.ndarray:
        """Return t at the ends of the S steps [S + 1], descending in 1 ... 1/N."""
        N = self.model.num_timesteps
        check_steps(S, N)
        return np.linspace(1, 1 / N, S + 1)

    def _model_times(self, t: np.ndarray) -> np.ndarray:
        """Return the model's times in 0 ... N - 1 for t in 1/N ... 1."""
        N = self.model.num_timesteps
        return (t - 1 / N) * N

    def _prepare(self, S: int, eta: float) -> int:
        N = self.model.num_timesteps
        t = self._times(S)
        log_alpha_bar = np.log(self.alphas_cumprod.double().numpy())
        log_alpha = np.interp(t, np.arange(1, N + 1) / N, log_alpha_bar / 2)
        self.model_times: list[int | float] = self._model_times(t)[:-1].tolist()
        self.alphas = np.exp(log_alpha)
        self.sigmas = np.sqrt(-np.expm1(2 * log_alpha))  # alpha² + sigma² = 1
        self.lambdas = log_alpha - np.log(self.sigmas)  # half the log signal-to-noise ratio
        self.first_order_end = S < FEW_STEPS
        return S

    def _skip(self, n_steps: int) -> None:
        self.model_times = self.model_times[n_steps:]
        self.alphas, self.sigmas, self.lambdas = (table[n_steps:] for table in (self.alphas, self.sigmas, self.lambdas))

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        return diffuse(x0, noise, float(self.alphas[0]) ** 2)

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        """Go from t_{i-1} to t_i (algorithm 2)."""
        alpha, sigma, lam = self.alphas.tolist(), self.sigmas.tolist(), self.lambdas.tolist()
        x0 = x0_before = h_before = None
        for i in range(1, n_steps + 1):
            x = keep(x, alpha[i - 1] ** 2)
            eps = self._eps(predict_eps, x, i - 1)
            x0, x0_before = (x - sigma[i - 1] * eps) / alpha[i - 1], x0
            h = lam[i] - lam[i - 1]
            if i == 1 or (i == n_steps and self.first_order_end):
                D = x0
            else:
                r = h_before / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * expm1(-h) * D
            h_before = h
            yield x, x0

    def _eps(self, predict_eps: PredictEps, x: Tensor, i: int) -> Tensor:
        """Return the noise in x at place i of the tables."""
        return predict_eps(x, self.model_times[i])


class DPMSolverKarrasSampler(DPMSolverSampler):
    """DPM-Solver++(2M) at the noise levels of Karras et al. (arXiv:2206.00364, eq. 5), down to no noise at all.

    A noise level is s = sigma / alpha. The model is called at the whole timestep whose noise is nearest, where log s is
    interpolated linearly between timesteps. The last step, to s = 0, is of first order: it ends at the predicted x_0.
    """

    name = "DPM++ 2M Karras"

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the S whole times at which the model is called, descending; with many steps, some come twice."""
        self._eta(eta)
        return self._whole_times(self._noise_levels(S))

    def _noise_levels(self, S: int) -> np.ndarray:
        """Return s at the starts of the S steps [S]: (s_max^(1/rho) + i/(S-1) (s_min^(1/rho) - s_max^(1/rho)))^rho."""
        check_steps(S, self.model.num_timesteps)
        s = self._training_levels()
        first, last = s[-1] ** (1 / RHO), s[0] ** (1 / RHO)
        return (first + np.linspace(0, 1, S) * (last - first)) ** RHO

    def _training_levels(self) -> np.ndarray:
        """Return s at each timestep of training [N], ascending."""
        alpha_bar = self.alphas_cumprod.double().numpy()
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def _whole_times(self, levels: np.ndarray) -> list[int | float]:
        log_s = np.log(self._training_levels())
        times = np.interp(np.log(levels), log_s, np.arange(len(log_s)))
        return np.rint(times).astype(np.int64).tolist()

    def _prepare(self, S: int, eta: float) -> int:
        levels = self._noise_levels(S)
        self.model_times = self._whole_times(levels)
        s = np.append(levels, 0.0)
        self.alphas = 1 / np.sqrt(1 + s**2)
        self.sigmas = s * self.alphas
        self.lambdas = np.append(-np.log(levels), np.inf)
        self.first_order_end = True
        return S

    def _eps(self, predict_eps: PredictEps, x: Tensor, i: int) -> Tensor:
        """Return the noise in x at place i of the tables.

        A prediction of v, which the model has turned into eps at the level of a whole timestep, is turned into the eps
        of the level that x has, beside it: eps = alpha v + sigma x.
        """
        eps = super()._eps(predict_eps, x, i)
        if getattr(self.model, "parameterization", "eps") == "eps":
            return eps
        alpha_bar = float(self.alphas_cumprod[int(self.model_times[i])])
        v = (eps - (1 - alpha_bar) ** 0.5 * x) / alpha_bar**0.5
        return float(self.alphas[i]) * v + float(self.sigmas[i]) * x
