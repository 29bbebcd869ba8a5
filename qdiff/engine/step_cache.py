"""Keep results of a lowered UNet that would be the same in a later step, or for a later picture.

A time embedding and what each ResBlock makes of it depend on the timestep alone; keys and values of a prompt depend on
the prompt alone. They are kept within a `walk` over the times of a sampler.
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
    """Let a lowered UNet compute only once, within the block, what depends on the timestep or on the context alone.

    unet: a QuantModel or a UNet; one that is not lowered computes as always. timesteps: the times at which it will be
    called, as `Sampler.schedule` returns them; for other times nothing is kept. Outputs are the same with and without a
    walk, bit for bit.
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
    """The result of a layer for a context. how: what it was made with beside the layer; None for its plain output."""

    context: Tensor
    how: Any
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
        self.changes = 0  # how often all results were dropped, as when the model changes

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
        """Keep the results of time `timesteps` [1] within the block, which is one call of the UNet.

        Nothing is kept for a call with no time or several times, outside of a walk, or at a time off the schedule.
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
        """Return the result of `compute()`, kept for this layer and the time of the present call."""
        if self._time is None or torch.is_grad_enabled():
            return compute()
        kept = self._by_time[self._time]
        if layer not in kept:
            kept[layer] = compute()
        return kept[layer]

    def of_context(self, layer: nn.Module, context: Tensor, how: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute()`, kept for this layer and this very tensor `context` until the walk ends.

        how: what the result depends on beside them.
        """
        if self._by_context is None or torch.is_grad_enabled():
            return compute()
        kept = self._by_context.get(layer)
        if kept is None or kept.context is not context or kept.how != how:
            kept = self._by_context[layer] = _OfContext(context=context, how=how, result=compute())
        return kept.result

    def results_of_time(self, time: float) -> dict[nn.Module, Tensor]:
        """Return what is kept of a time of the schedule, by layer; changes of it are changes of the cache."""
        return self._by_time[time]

    def results_of_context(self) -> dict[nn.Module, tuple[Tensor, Any]]:
        """Return what is kept of the last context in this walk, by layer, and what it was made with."""
        return {layer: (kept.result, kept.how) for layer, kept in (self._by_context or {}).items()}

    def clear(self) -> None:
        """Drop all results, as a model that moves to another device must."""
        self.changes += 1
        self._by_time = {time: {} for time in self._by_time}
        self._by_context = None if self._by_context is None else {}


class TimeLayer(nn.Module):
    """Wrap a layer of the time embedding, whose results the cache keeps."""

    def __init__(self, layer: nn.Module, cache: StepCache):
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(self, emb: Tensor) -> Tensor:
        return self.cache.of_time(self, lambda: self.layer(emb))


class ContextLayer(nn.Module):
    """Wrap a layer of the context, whose results the cache keeps. layer: a CodesLayer."""

    layer: Any

    def __init__(self, layer: nn.Module, cache: StepCache):
        super().__init__()
        self.layer, self.cache = layer, cache

    def forward(self, context: Tensor) -> Tensor:
        return self.cache.of_context(self, context, None, lambda: self.layer(context))

    def to_codes(self, context: Tensor, params: QuantParams) -> Tensor:
        """Return the codes of the layer's output by `params`. context: float [B, M, C], which is quantized first."""
        return self._kept(context, ("to_codes", params))

    def to_numbers(self, context: Tensor, params: QuantParams, unit: float, dtype: torch.dtype) -> Tensor:
        """Return the numbers (c - Z) unit of these codes, in `dtype`."""
        return self._kept(context, ("to_numbers", params, unit, dtype))

    def _kept(self, context: Tensor, how: tuple[Any, ...]) -> Tensor:
        return self.cache.of_context(self, context, how, lambda: self.compute(context, how))

    def compute(self, context: Tensor, how: tuple[Any, ...] | None) -> Tensor:
        """Return the layer's output, or that of the method `how[0]` with further arguments; nothing is kept."""
        if how is None:
            return self.layer(context)
        return getattr(self.layer, how[0])(self.layer.quantize(context), *how[1:])
