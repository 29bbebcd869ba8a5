"""Group norms in two steps: statistics of a map's groups, and the line of each channel that follows from them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.engine.decoder.layers import stripes

TINY = 1e-12  # added to the variance of a stripe, to divide by its root

Lines = tuple[Tensor, Tensor]  # the slope and the shift of each channel, float32 [1, C, 1, 1]


@dataclass(kw_only=True)
class Sums:
    """The mean and the mean square of a map's groups, float64 [groups], over a number of rows."""

    mean: Tensor
    square: Tensor
    rows: int

    @classmethod
    def none(cls, groups: int, device: torch.device) -> "Sums":
        """Return the sums over no rows."""
        mean, square = torch.zeros(2, groups, dtype=torch.float64, device=device)
        return cls(mean=mean, square=square, rows=0)

    @classmethod
    def of(cls, x: Tensor, groups: int) -> "Sums":
        """Return the sums of a map [1, C, H, W]."""
        sums = cls.none(groups, x.device)
        for start, stop in stripes(*x.shape[2:]):
            sums.add(x[:, :, start:stop])
        return sums

    def add(self, x: Tensor) -> None:
        """Take in more rows [1, C, rows, W]. Their own statistics are computed in float32."""
        _, channels, rows, width = x.shape
        x = x.float() if x.device.type == "cpu" else x.float().contiguous()  # other kernels know one order alone
        _, mean, slope = torch.native_group_norm(
            x, None, None, 1, channels, rows * width, len(self.mean), TINY
        )  # as fast as one pass over memory; the normed values are not used
        mean, slope = mean[0].double(), slope[0].double()
        share = rows / (self.rows + rows)
        self.square += (slope.pow(-2) - TINY + mean.square() - self.square) * share
        self.mean += (mean - self.mean) * share
        self.rows += rows


def affine(norm: nn.GroupNorm, sums: Sums) -> Lines:
    """Return the lines a x + b that a group norm is for a map with these sums."""
    slope = (sums.square - sums.mean.square()).clamp_min(0).add(norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    slopes = slope.repeat_interleave(each) * norm.weight
    shifts = norm.bias - sums.mean.repeat_interleave(each) * slopes
    return slopes.float().view(1, -1, 1, 1), shifts.float().view(1, -1, 1, 1)


def apply_affine(x: Tensor, lines: Lines) -> Tensor:
    """Return a x + b in float32, for x [1, C, rows, W] of any float dtype."""
    return torch.addcmul(lines[1], x.float(), lines[0])
