"""Group norms in two steps: sums over a map, and the affine map of each channel that follows from them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.engine.decoder.layers import stripes

Lines = tuple[Tensor, Tensor]  # the slope and the shift of each channel, float32 [1, C, 1, 1]


@dataclass(kw_only=True)
class Sums:
    """The sums of a map's channels and of their squares, float64 [C], and the number of pixels that they are over."""

    first: Tensor
    second: Tensor
    pixels: int

    @classmethod
    def none(cls, channels: int, device: torch.device) -> "Sums":
        """Return the sums over no pixels."""
        first, second = torch.zeros(2, channels, dtype=torch.float64, device=device)
        return cls(first=first, second=second, pixels=0)

    @classmethod
    def of(cls, x: Tensor) -> "Sums":
        """Return the sums of a map [1, C, H, W]."""
        sums = cls.none(x.shape[1], x.device)
        for start, stop in stripes(*x.shape[2:]):
            sums.add(x[:, :, start:stop])
        return sums

    def add(self, x: Tensor) -> None:
        """Add the sums of more rows [1, C, rows, W]. Those of a stripe are float32."""
        values = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()
        self.first += values.sum(0)
        self.second += values.square().sum(0)
        self.pixels += len(values)


def affine(norm: nn.GroupNorm, sums: Sums) -> Lines:
    """Return the lines a x + b that a group norm is for a map with these sums."""
    count = sums.pixels * norm.num_channels // norm.num_groups
    mean, square = (each.view(norm.num_groups, -1).sum(1) / count for each in (sums.first, sums.second))
    slope = (square - mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    slopes = slope.repeat_interleave(each) * norm.weight
    shifts = norm.bias - mean.repeat_interleave(each) * slopes
    return slopes.float().view(1, -1, 1, 1), shifts.float().view(1, -1, 1, 1)


def apply_affine(x: Tensor, lines: Lines) -> Tensor:
    """Return a x + b in float32, for x [1, C, rows, W] of any float dtype."""
    return torch.addcmul(lines[1], x.float(), lines[0])
