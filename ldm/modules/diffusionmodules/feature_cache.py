"""Deep features of a UNet, kept for some steps (DeepCache: Ma et al. 2023, arXiv:2312.00858).

From step to step the features of the deep levels change little, those at the top much. So in most steps only the ends
of the UNet are computed: its first `depth` input blocks and its last `depth` output blocks. What the deeper blocks in
between make comes from the last step in which all was computed.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FeatureCache:
    """The deep features of one walk from noise to picture.

    is_whole: says of a step, by its number from 0, if all of the UNet is computed. depth: how many input blocks and
    output blocks are computed in the other steps, 1 or more. Calls in a row with one timestep are one step.
    """

    def __init__(self, is_whole: Callable[[int], bool], depth: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"cache_depth is {depth!r}: it must be a whole number of 1 or more")
        self.is_whole, self.depth = is_whole, depth
        self.step = -1
        self.time: float | None = None
        self.features: Tensor | None = None

    def begin(self, timesteps: Tensor, batch: int) -> Tensor | None:
        """Return the deep features for a call at `timesteps`, all alike; None if all of the UNet is to be computed.

        Features of another batch, as of a step with guidance when this one has none, are of no use.
        """
        time = float(timesteps.flatten()[0])
        if time != self.time:
            self.step, self.time = self.step + 1, time
        if self.is_whole(self.step) or self.features is None or len(self.features) != batch:
            return None
        return self.features

    def keep(self, features: Tensor) -> None:
        """Keep what the last of the deeper blocks has made, [B, C, h, w]."""
        self.features = features.detach()


@contextmanager
def cached_features(unet: nn.Module, is_whole: Callable[[int], bool], depth: int = 1) -> Iterator[None]:
    """Let a UNet keep its deep features within the block, which is one walk of a sampler.

    unet: a UNetModel, or a module that holds one. is_whole, depth: see FeatureCache. Gradients must not be recorded.
    Raises ValueError for a depth that leaves nothing to keep, and within another such block.
    """
    models: list[Any] = [module for module in unet.modules() if hasattr(module, "feature_cache")]
    for model in models:
        if model.feature_cache is not None:
            raise ValueError("the features of this UNet are cached already")
        if depth >= len(model.output_blocks):
            most = len(model.output_blocks) - 1
            raise ValueError(f"cache_depth is {depth!r}: this UNet has {most + 1} output blocks, so {most} at most")
    try:
        for model in models:
            model.feature_cache = FeatureCache(is_whole, depth)
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.feature_cache = None


def every(interval: int) -> Callable[[int], bool]:
    """Return the rule that computes all of the UNet in every `interval`-th step, the first included.

    Raises ValueError unless `interval` is 1 or more.
    """
    if interval < 1:
        raise ValueError(f"cache is {interval!r}: it must be a whole number of 1 or more")
    return lambda step: step % interval == 0


def in_steps(numbers: Collection[int]) -> Callable[[int], bool]:
    """Return the rule that computes all of the UNet in the steps of these numbers, from 0, and in no other."""
    return frozenset(numbers).__contains__
