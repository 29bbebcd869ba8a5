"""TCD: trajectory consistency distillation (Zheng et al., arXiv:2402.19159)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.lcm import ConsistencySampler
from ldm.models.diffusion.sampler import DrawNoise, KeepKnown, Step


class TCDSampler(ConsistencySampler):
    """Strategic stochastic sampling, as the paper calls it, with LCM's times.

    Each step goes from t by DDIM's rule to s = (1 - gamma) t_next, which is below the next time, and from there up to
    t_next by fresh noise. `eta` is the paper's gamma: 0 adds no noise, 1 is LCM's way. The last step goes to t = 0 and
    stays there.
    """

    name = "TCD"
    default_eta = 0.3

    def _prepare(self, S: int, eta: float) -> int:
        self.model_times = self.schedule(S)
        following = np.array([*self.model_times[1:], 0])
        # In float32, whose rounding decides where (1 - gamma) t_next is nearly whole.
        below = np.floor(np.float32(1 - eta) * following.astype(np.float32)).astype(np.int64)
        table = self.alphas_cumprod.double()
        self.alpha_bars = table[self.model_times].tolist()
        self.alpha_bars_s: list[float] = table[below.tolist()].tolist()
        self.alpha_bars_next: list[float] = table[following.tolist()].tolist()
        return S

    def _skip(self, n_steps: int) -> None:
        self.model_times, self.alpha_bars = self.model_times[n_steps:], self.alpha_bars[n_steps:]
        self.alpha_bars_s, self.alpha_bars_next = self.alpha_bars_s[n_steps:], self.alpha_bars_next[n_steps:]

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        for i, t in enumerate(self.model_times):
            a_t, a_s, a_next = self.alpha_bars[i], self.alpha_bars_s[i], self.alpha_bars_next[i]
            x = keep(x, a_t)
            eps = predict_eps(x, t)
            pred_x0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
            x = a_s**0.5 * pred_x0 + (1 - a_s) ** 0.5 * eps
            if a_next < a_s:
                x = (a_next / a_s) ** 0.5 * x + (1 - a_next / a_s) ** 0.5 * noise()
            yield x, pred_x0
