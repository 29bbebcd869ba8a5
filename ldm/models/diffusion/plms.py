"""PLMS: the linear multi-step method of PNDM (Liu, Ren, Lin & Zhao, arXiv:2202.09778)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import reduce
from operator import add

from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import PredictEps
from ldm.models.diffusion.sampler import DrawNoise, KeepKnown, Step, steps_from

# Number of noise predictions -> their Adams-Bashforth weights, the newest first.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),  # eq. 12
}


class PLMSSampler(DDIMSampler):
    """PLMS: DDIM's tables and step (eq. 9 is DDIM's without noise), applied to an extrapolated noise e'.

    The first step has no past to extrapolate from and calls the model twice, so that n steps make n + 1 calls.
    """

    name = "PLMS"
    default_eta = None

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Compute the tables as DDIMSampler.make_schedule does. Raise ValueError unless `ddim_eta` is 0."""
        self._eta(ddim_eta)
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def schedule(self, S: int, eta: float | None = None) -> list[int | float]:
        """Return DDIM's times, where the end of the first step comes twice: n + 1 times for n steps."""
        return _first_twice(super().schedule(S, eta))

    def schedule_from(self, S: int, eta: float | None = None, strength: float = 1.0) -> list[int | float]:
        """Return the times of the walk at a strength; it, too, calls the model twice in its first step."""
        times = super().schedule(S, eta)
        return _first_twice(times[len(times) - steps_from(len(times), strength) :])

    def _steps(
        self, predict_eps: PredictEps, x: Tensor, n_steps: int, noise: DrawNoise, keep: KeepKnown
    ) -> Iterator[Step]:
        e = deque(maxlen=4)  # e_t, e_{t+δ}, e_{t+2δ}, e_{t+3δ}
        for i in reversed(range(n_steps)):
            x = keep(x, float(self.ddim_alphas[i]))
            e.appendleft(predict_eps(x, int(self.ddim_timesteps[i])))
            if len(e) == 1:  # pseudo improved Euler: the mean of the slopes at both ends of the step
                x_end, _ = self._update(x, e[0], i, noise)
                e_prime = (e[0] + predict_eps(x_end, int(self.ddim_timesteps[max(i - 1, 0)]))) / 2
            else:
                e_prime = reduce(add, (w * e_k for w, e_k in zip(ADAMS_BASHFORTH[len(e)], e, strict=True)))
            x, pred_x0 = self._update(x, e_prime, i, noise)
            yield x, pred_x0


def _first_twice(times: list[int | float]) -> list[int | float]:
    """Return descending times with those of the two calls in the first step."""
    first, *others = times
    return [first, others[0] if others else first, *others]
