"""Low-rank changes to a layer (Hu et al. 2021): as a change of its weight, or as a branch beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change to one layer: strength up down. down: [rank, inputs, *kernel], up: [outputs, rank], as in the file.

    strength: alpha / rank.
    """

    down: Tensor
    up: Tensor
    strength: float

    def delta(self) -> Tensor:
        """Return the change to the weight, float32 [outputs, inputs, *kernel]."""
        product = self.up.float() @ self.down.float().flatten(1)
        return product.mul_(self.strength).view(len(self.up), *self.down.shape[1:])


class LowRankBranch(nn.Module):
    """The changes of several LoRAs to one layer, as two thin products: up(strength down(x)).

    down: [ranks, inputs, *kernel] and up: [outputs, ranks], those of all changes one after the other, in the dtype of
    their files. strength: float32 [ranks], scale alpha / rank. options: a convolution's stride, padding and dilation.
    """

    down: Tensor
    up: Tensor
    strength: Tensor

    def __init__(self, down: Tensor, up: Tensor, strength: Tensor, options: Mapping[str, Any] | None = None):
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("strength", strength)
        self.options = {name: options[name] for name in ("stride", "padding", "dilation")} if options else {}

    @classmethod
    def of(cls, changes: Sequence[tuple[LowRank, float]], options: Mapping[str, Any] | None = None) -> "LowRankBranch":
        """Return the branch of changes, each with its scale."""
        strengths = [torch.full([len(change.down)], scale * change.strength) for change, scale in changes]
        only = changes[0][0] if len(changes) == 1 else None  # not copied: it stays in the mapped file
        down = only.down if only else torch.cat([change.down.float() for change, _ in changes])
        up = only.up if only else torch.cat([change.up.float() for change, _ in changes], dim=1)
        return cls(down, up, torch.cat(strengths), options)

    def part(self, inputs: slice) -> "LowRankBranch":
        """Return the branch on some of the inputs alone; branches on all parts of the inputs add up to this one."""
        return LowRankBranch(self.down[:, inputs], self.up, self.strength, self.options or None)

    def forward(self, x: Tensor, step: float = 1.0) -> Tensor:
        """Return the change to the layer's output for step x, in x's dtype (or autocast's)."""
        down, up, strength = self.down.to(x.dtype), self.up.to(x.dtype), self.strength * step
        if down.ndim == 2:
            return F.linear((F.linear(x, down) * strength).to(x.dtype), up)
        convolution = F.conv1d if down.ndim == 3 else F.conv2d
        around = [1] * (down.ndim - 2)
        inner = convolution(x, down, **self.options) * strength.view(-1, *around)
        return convolution(inner.to(x.dtype), up.view(*up.shape, *around))


class BranchedLayer(nn.Module):
    """A float layer with a branch beside it: layer(x) + branch(x)."""

    def __init__(self, layer: nn.Module, branch: LowRankBranch):
        super().__init__()
        self.layer, self.branch = layer, branch

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output + self.branch(x).to(output.dtype)
