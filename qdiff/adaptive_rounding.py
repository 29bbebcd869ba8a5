"""AdaRound: learning whether each weight is rounded up or down (Nagel et al. 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from qdiff.quant_layer import Quantizer, UniformAffineQuantizer

GAMMA, ZETA = -0.1, 1.1  # how far the sigmoid is stretched beyond 0 and 1


class AdaRoundQuantizer(Quantizer):
    """q = clamp(floor(w / delta) + h(alpha) + zero_point), with alpha of the weight's shape.

    h is the rectified sigmoid (eq. 23) within `soft_rounding()`, and elsewhere 1 where alpha >= 0, else 0. A weight
    half way between two codes starts at alpha = 0 and so goes up.
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
        """With the ranges of a fitted quantizer, and alpha so that h(alpha) is the fraction w / delta - floor."""
        if not quantizer.is_set:
            raise ValueError("the range of the weight is not known yet: fit the quantizer first")
        steps = weight.detach().float() / quantizer.delta
        fraction = steps - steps.floor()
        alpha = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)  # the inverse of h
        adaround = cls(quantizer.n_bits, quantizer.symmetric, quantizer.delta, quantizer.zero_point, alpha)
        adaround.enabled = quantizer.enabled
        return adaround

    def soft_targets(self) -> Tensor:
        """h(alpha), in [0, 1]."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self, x: Tensor) -> Tensor:
        up = self.soft_targets() if self.soft else (self.alpha >= 0).float()
        return ((x.float() / self.delta).floor() + up + self.zero_point).clamp(self.low, self.high)


@contextmanager
def soft_rounding(module: nn.Module) -> Iterator[None]:
    """Within the block all AdaRoundQuantizers of `module` round softly, so that alpha has a gradient."""
    quantizers = [m for m in module.modules() if isinstance(m, AdaRoundQuantizer)]
    before = [quantizer.soft for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.soft = True
        yield
    finally:
        for quantizer, soft in zip(quantizers, before, strict=True):
            quantizer.soft = soft
