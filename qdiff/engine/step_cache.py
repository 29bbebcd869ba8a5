"""Keep what is the same in every step of a sampler, or for every picture.

A time embedding and what each ResBlock makes of it depend on the timestep alone; keys and values of a prompt depend on
the prompt alone. A `walk` over the times of a sampler says for how long they are worth keeping.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.engine.quant_params import QuantParams


@contextmanager
def walk(unet: nn.Module, timesteps: Iterable[float]) -> Iterator[None]:
    """Within the block, a lowered UNet computes only once what depends on the timestep or on the context alone.

    unet: a QuantModel or a UNet; one that is not lowered computes as always. timesteps: the times at which it will be
    called, such as `Sampler.schedule` gives. Other times may come, too: nothing is kept for them. The same bits come
    out with and without a walk.
    """
    for module in unet.modules():
        cache = getattr(module, "step_cache", None)
        if isinstance(cache, StepCache):
            with cache.walk(timesteps):
                yield
            return
    yield


@dataclass(frozen=True, kw_only=True)
class _OfContext:
    """The result of a layer for a context. params: those of the codes that it made; None if it made floats."""

    context: Tensor
    params: QuantParams | None
    result: Tensor


class StepCache:
    """The results that a lowered UNet keeps; LoweredUNet has it as `step_cache`, and its layers share it.

    Results of a timestep are kept after the walk, too, for walks with the same schedule: for Stable Diffusion v1 about
    90 KB a step. Results of a context are dropped at the end of the walk. Nothing is kept outside of a walk, and
    nothing is kept or used while gradients are recorded.
    """

    def __init__(self):
        self._by_time: dict[float, dict[nn.Module, Tensor]] = {}  # its keys are the schedule
        self._by_context: dict[nn.Module, _OfContext] | None = None  # None outside of a walk
        self._time: float | None = None  # of the present call; None if its results are not to be kept

    @contextmanager
    def walk(self, timesteps: Iterable[float]) -> Iterator[None]:
        """See `walk`. A walk within a walk has results of its own; afterwards the outer one goes on."""
        schedule = torch.tensor([float(t) for t in timesteps], dtype=torch.float32).tolist()
        outer = self._by_time, self._by_context
        if self._by_time.keys() != set(schedule):
            self._by_time = {time: {} for time in schedule}
        self._by_context = {}
        try:
            yield
        finally:
            if outer[1] is not None:
                self._by_time = outer[0]
            self._by_context = outer[1]

    @contextmanager
    def at(self, timesteps: Tensor) -> Iterator[None]:
        """Within the block, a call of the UNet, results are those of this time. timesteps: [1], of the whole batch.

        More than one time in a call: nothing is kept.
        """
        before = self._time
        if self._by_context is not None and len(timesteps) == 1 and not torch.is_grad_enabled():
            time = timesteps.float().item()  # as exact as timestep_embedding takes it
            self._time = time if time in self._by_time else None
        try:
            yield
        finally:
            self._time = before

    def of_time(self, layer: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` gives, kept for this layer and the time of the present call."""
        if self._time is None or torch.is_grad_enabled():
            return compute()
        kept = self._by_time[self._time]
        if layer not in kept:
            kept[layer] = compute()
        return kept[layer]

    def of_context(
        self, layer: nn.Module, context: Tensor, params: QuantParams | None, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return what `compute` makes of this very tensor, kept for this layer until the walk ends."""
        if self._by_context is None or torch.is_grad_enabled():
            return compute()
        kept = self._by_context.get(layer)
        if kept is None or kept.context is not context or kept.params != params:
            kept = self._by_context[layer] = _OfContext(context=context, params=params, result=compute())
        return kept.result

    def clear(self) -> None:
        """Drop all results, as a model that moves to another device must."""
        self._by_time = {time: {} for time in self._by_time}
        self._by_context = None if self._by_context is None else {}


class TimeLayer(nn.Module):
    """A layer of the time embedding that the cache keeps the results of."""

    def __init__(self, layer: nn.Module, cache: StepCache):
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(self, emb: Tensor) -> Tensor:
        return self.cache.of_time(self, lambda: self.layer(emb))


class ContextLayer(nn.Module):
    """A layer of the context that the cache keeps the results of. layer: a CodesLayer."""

    layer: Any

    def __init__(self, layer: nn.Module, cache: StepCache):
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(self, context: Tensor) -> Tensor:
        return self.cache.of_context(self, context, None, lambda: self.layer(context))

    def to_codes(self, context: Tensor, params: QuantParams) -> Tensor:
        """Return the layer's output as codes by `params`. context: float [B, M, C], quantized first."""
        layer = self.layer
        return self.cache.of_context(self, context, params, lambda: layer.to_codes(layer.quantize(context), params))
