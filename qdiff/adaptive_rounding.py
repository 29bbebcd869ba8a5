"""AdaRound: learning whether each weight is rounded up or down (Nagel et al. 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.config import ReconConfig
from qdiff.quantizers import Quantizer, UniformAffineQuantizer, clamp_ste

GAMMA, ZETA = -0.1, 1.1  # how far the sigmoid is stretched beyond 0 and 1


class AdaRoundQuantizer(Quantizer):
    """q = clamp(floor(w / delta) + h(alpha) + zero_point), with alpha of the weight's shape.

    h is the rectified sigmoid (eq. 23) within `soft_rounding()`. Elsewhere h is 1 where alpha >= 0, and 0 where not. A
    weight half way between two codes starts at alpha = 0, so it is rounded up.
    """

    alpha: nn.Parameter

    def __init__(self, n_bits: int, symmetric: bool, delta: Tensor, zero_point: Tensor, alpha: Tensor):
        super().__init__(n_bits, symmetric)
        self.soft = False
        self.to(delta.device)
        self.set(delta, zero_point)
        self.alpha = nn.Parameter(alpha)

    @classmethod
    def from_uniform(cls, quantizer: UniformAffineQuantizer, weight: Tensor) -> "AdaRoundQuantizer":
        """Return one with the ranges of a fitted quantizer, and with h(alpha) = w / delta - floor(w / delta).

        Raises ValueError if the quantizer has no range yet.
        """
        if not quantizer.is_set:
            raise ValueError("the range of the weight is not known yet: fit the quantizer first")
        steps = weight.detach().float() / quantizer.delta
        fraction = steps - steps.floor()
        alpha = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)  # the inverse of h
        adaround = cls(quantizer.n_bits, quantizer.symmetric, quantizer.delta, quantizer.zero_point, alpha)
        adaround.enabled = quantizer.enabled
        return adaround

    def soft_targets(self) -> Tensor:
        """Return the rectified sigmoid h(alpha), in [0, 1]."""
        return clamp_ste(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def codes(self, x: Tensor) -> Tensor:
        up = self.soft_targets() if self.soft else (self.alpha >= 0).float()
        return clamp_ste((x.float() / self.delta).floor() + up + self.zero_point, self.low, self.high)


@contextmanager
def soft_rounding(module: nn.Module) -> Iterator[None]:
    """Make all AdaRoundQuantizers of `module` round softly within the block, so that alpha has a gradient."""
    quantizers = [m for m in module.modules() if isinstance(m, AdaRoundQuantizer)]
    before = [quantizer.soft for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.soft = True
        yield
    finally:
        for quantizer, soft in zip(quantizers, before, strict=True):
            quantizer.soft = soft


def round_exponent(step: int, iters: int, config: ReconConfig) -> float | None:
    """Return the exponent b of the regulariser at a step; None during the warm-up.

    b falls linearly from b_start to b_end (AdaRound, eq. 24).
    """
    warm_up = config.warmup * iters
    if step < warm_up:
        return None
    share = (step - warm_up) / max(iters - warm_up, 1)
    return config.b_end + (config.b_start - config.b_end) * max(0.0, 1 - share)


def round_penalty(quantizers: list[AdaRoundQuantizer], b: float | None, weight: float) -> Tensor:
    """Return weight * sum of 1 - |2 h(alpha) - 1|^b: least where every h is 0 or 1 (eq. 24). Zero if b is None."""
    zero = torch.zeros((), device=quantizers[0].alpha.device)
    if b is None:
        return zero
    return weight * sum(((1 - (2 * q.soft_targets() - 1).abs().pow(b)).sum() for q in quantizers), start=zero)
