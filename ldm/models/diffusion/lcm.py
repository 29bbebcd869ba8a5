"""LCM: latent consistency models (Luo et al., arXiv:2310.04378), and LCM-LoRA (arXiv:2311.05556)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.sampler import DrawNoise, KeepKnown, Sampler, Step, check_steps, diffuse

TEACHER_STEPS = 50  # of the solver from which the published models were distilled: they know no other times
SIGMA_DATA = 0.5  # the data's standard deviation in the boundary condition
TIME_SCALING = 10.0  # of the timestep in the boundary condition


class ConsistencySampler(Sampler):
    """The times of samplers for distilled models: S of the teacher's 50, evenly spread, from N - 1 down."""

    alpha_bars: list[float]  # at the times of the walk

    @classmethod
    def steps_taken(cls, S: int, num_timesteps: int) -> int:
        """Return S. Raise ValueError for one beyond the teacher's number of steps."""
        check_steps(S, min(TEACHER_STEPS, num_timesteps))
        return S

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return the S whole times at which the model is called, descending."""
        self._eta(eta)
        N = self.model.num_timesteps
        self.steps_taken(S, N)
        teacher = np.arange(min(TEACHER_STEPS, N), 0, -1) * (N // min(TEACHER_STEPS, N)) - 1
        return teacher[np.linspace(0, len(teacher), S, endpoint=False).astype(np.int64)].tolist()

    def _noised(self, x0: Tensor, noise: Tensor, n_steps: int) -> Tensor:
        return diffuse(x0, noise, self.alpha_bars[0])


class LCMSampler(ConsistencySampler):
    """Multistep consistency sampling: predict x_0, and put it back to the next, lower noise.

    The consistency function is f(x, t) = c_skip(t) x + c_out(t) x_0(x, t), with c_skip = 1/4 / (s² + 1/4) and
    c_out = s / sqrt(s² + 1/4) at the scaled time s = 10 t. The noise of each step is fresh, so that eta has no effect.
    """

    name = "LCM"

    def _prepare(self, S: int, eta: float) -> int:
        self.model_times = self.schedule(S)
        self.alpha_bars = self.alphas_cumprod.double()[self.model_times].tolist()
        return S

    def _skip(self, n_steps: int) -> None:
        self.model_times, self.alpha_bars = self.model_times[n_steps:], self.alpha_bars[n_steps:]

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        alpha_bar = self.alpha_bars
        for i, t in enumerate(self.model_times):
            x = keep(x, alpha_bar[i])
            eps = predict_eps(x, t)
            pred_x0 = (x - (1 - alpha_bar[i]) ** 0.5 * eps) / alpha_bar[i] ** 0.5
            c_skip, c_out = boundary_scalings(t)
            x = c_skip * x + c_out * pred_x0
            if i < n_steps - 1:
                x = diffuse(x, noise(), alpha_bar[i + 1])
            yield x, pred_x0


def boundary_scalings(t: float) -> tuple[float, float]:
    """Return (c_skip, c_out) at timestep t; at 0 they are (1, 0), so that the consistency function is the identity."""
    s = TIME_SCALING * t
    return SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s / (s**2 + SIGMA_DATA**2) ** 0.5
