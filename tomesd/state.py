"""The state that the patched blocks of a network share: options, generator, the size of the latents, the step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .merge import Matching, Nearest
from .options import DOWNSAMPLES, MergeOptions


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """The tokens of a block in its last forward; zeros before the first.

    name: the block's name within the diffusion model. tokens_in: tokens it was given, per sample.
    tokens_processed: tokens that its merged layers worked on; with `merge_kv`, those of keys and values.
    """

    name: str
    tokens_in: int
    tokens_processed: int


@dataclass(kw_only=True)
class Walk:
    """The calls of the network that make a picture, or a batch of them. calls: how many. call: the present one."""

    calls: int
    call: int = -1


# A matching that may be used again, by batch, h, w and device of its tokens; and the number of the forward of the
# network in which it was made.
Kept = dict[tuple[int, int, int, torch.device], tuple[int, Matching]]


class ModelMerging:
    """The options, the generator, the size of the latents and the step, which the patched blocks of a network share."""

    def __init__(self, options: MergeOptions, network: nn.Module, nearest: Nearest | None):
        self.options = options
        self.nearest = nearest
        self.generator = torch.Generator()
        self.size: tuple[int, int] | None = None  # (H, W) of the latents
        self.forwards = 0  # of the whole network, so far
        self.matched = 0  # the forward in which blocks last made new matchings
        self.walk: Walk | None = None
        self.kept: Kept = {}  # the matchings of the first block of each level
        self.pinned = False  # True: each block keeps its first draw
        self.reseed(options.seed)
        self.handle = network.register_forward_pre_hook(self.note_size, with_kwargs=True)

    def reseed(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        self.forwards += 1  # No block may keep what it drew or matched before.
        self.matched = self.forwards

    def note_size(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the network."""
        latents = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            raise ValueError(
                f"token merging needs latents [B, C, H, W] as the first argument of {type(network).__name__}"
            )
        self.size = (latents.shape[2], latents.shape[3])
        self.forwards += 1
        if self.walk is not None:
            self.walk.call += 1
        elif self.options.follows_steps:
            raise ValueError("merging by step needs to know the steps: call the model within tomesd.walk(model, calls)")
        if self.walk is None or self.walk.call % self.options.merge_every == 0:
            self.matched = self.forwards

    def ratio(self, downsample: int) -> float:
        """Return the ratio at a level in the present step; that of the last step in calls beyond the walk."""
        walk = self.walk or Walk(calls=1)
        return self.options.ratio_at(downsample, max(0, min(walk.call, walk.calls - 1)), walk.calls)

    def grid(self, tokens: int) -> tuple[int, int, int] | None:
        """Return (h, w, downsample) of a block's tokens; None if they are too coarse to be merged.

        Raises ValueError before the first forward, and for tokens that fill no downsampled grid of latents.
        """
        if self.size is None:
            raise ValueError("token merging does not know the latents' size yet: run the whole model once first")
        H, W = self.size
        estimate = max(1, math.ceil(math.sqrt(H * W // tokens)))
        if estimate > self.options.coarsest:
            return None
        # Odd sizes, rounded up at each level, can make the estimate too small.
        for downsample in (estimate, *DOWNSAMPLES):
            h, w = math.ceil(H / downsample), math.ceil(W / downsample)
            if h * w == tokens:
                return (h, w, downsample) if downsample <= self.options.coarsest else None
        raise ValueError(f"{tokens} tokens are no downsampled {H} x {W} grid: token merging cannot tell their places")
