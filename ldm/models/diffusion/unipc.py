"""UniPC: a unified predictor-corrector for fast sampling of diffusion models (Zhao et al., arXiv:2302.04867)."""

from __future__ import annotations

from collections.abc import Iterator
from math import expm1
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.sampler import DrawNoise, KeepKnown, Sampler, Step, check_steps, diffuse


class Prediction(NamedTuple):
    """The predicted x_0 at a place of the tables, and half the log signal-to-noise ratio there."""

    x0: Tensor
    lam: float


class UniPCSampler(Sampler):
    """UniPC of second order for the predicted x_0, with B_2(h) = e^h - 1, from t = N - 1 down to no noise.

    Each step predicts x at the next time (UniP), where the model is called once. That call also corrects the x just
    predicted (UniC), so that correcting costs no further call. First and last step are of first order. Times are whole.
    """

    name = "UniPC"

    @classmethod
    def steps_taken(cls, S: int, num_timesteps: int) -> int:
        """Return S. Raise ValueError for one beyond N - 1, for which two times would be the same."""
        check_steps(S, num_timesteps - 1)
        return S

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the S whole times at which the model is called, descending."""
        self._eta(eta)
        N = self.model.num_timesteps
        self.steps_taken(S, N)
        return np.rint(np.linspace(0, N - 1, S + 1))[:0:-1].astype(np.int64).tolist()

    def _prepare(self, S: int, eta: float) -> int:
        self.model_times = self.schedule(S)
        alpha_bar = np.append(self.alphas_cumprod.double().numpy()[self.model_times], 1.0)
        self.alphas, self.sigmas = np.sqrt(alpha_bar).tolist(), np.sqrt(1 - alpha_bar).tolist()
        log_snr = np.log(alpha_bar[:-1] / (1 - alpha_bar[:-1])) / 2
        self.lambdas: list[float] = [*log_snr.tolist(), float("inf")]
        return S

    def _skip(self, n_steps: int) -> None:
        self.model_times = self.model_times[n_steps:]
        self.alphas, self.sigmas, self.lambdas = self.alphas[n_steps:], self.sigmas[n_steps:], self.lambdas[n_steps:]

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        return diffuse(x0, noise, self.alphas[0] ** 2)

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        """Predict from t_i to t_{i+1}, after correcting x at t_i."""
        past: list[Prediction] = []  # the last two, the newest first
        start = x  # of the step before, corrected
        for i in range(n_steps):
            x = keep(x, self.alphas[i] ** 2)
            eps = predict_eps(x, self.model_times[i])
            new = Prediction((x - self.sigmas[i] * eps) / self.alphas[i], self.lambdas[i])
            if past:
                x = self._correct(start, i, past, new)
            past = [new, *past][:2]
            start = x
            x = self._predict(start, i + 1, past if 0 < i < n_steps - 1 else past[:1])
            yield x, new.x0

    def _predict(self, start: Tensor, i: int, past: list[Prediction]) -> Tensor:
        """Return x at place i from x at the place before (UniP); the order is the number of predictions.

        For the second order a_1 = 1/2, which needs no equations solved.
        """
        x, B = self._first_order(start, i, past[0])
        if len(past) == 1:
            return x
        r = (past[1].lam - past[0].lam) / (self.lambdas[i] - past[0].lam)
        return x - self.alphas[i] * B / 2 * (past[1].x0 - past[0].x0) / r

    def _correct(self, start: Tensor, i: int, past: list[Prediction], new: Prediction) -> Tensor:
        """Return x at place i from x at the place before, given the prediction there (UniC).

        The first correction is of first order (a_1 = 1/2), the others of the second: sum_m a_m r_m^(k-1) = b_k.
        """
        x, B = self._first_order(start, i, past[0])
        D = new.x0 - past[0].x0
        if len(past) == 1:
            return x - self.alphas[i] * B * D / 2
        h = new.lam - past[0].lam
        r = (past[1].lam - past[0].lam) / h
        g_1 = expm1(-h) / -h - 1
        g_2 = g_1 / -h - 1 / 2
        a_1, a_2 = np.linalg.solve([[1, 1], [r, 1]], [g_1 / B, 2 * g_2 / B]).tolist()
        return x - self.alphas[i] * B * (a_1 / r * (past[1].x0 - past[0].x0) + a_2 * D)

    def _first_order(self, start: Tensor, i: int, last: Prediction) -> tuple[Tensor, float]:
        """Return DDIM's x at place i from x at the place before, and B(-h) = e^-h - 1 of the step."""
        B = expm1(last.lam - self.lambdas[i])
        return self.sigmas[i] / self.sigmas[i - 1] * start - self.alphas[i] * B * last.x0, B
