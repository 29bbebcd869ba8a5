"""A lowered UNet whose calls are recorded once in a CUDA graph, and replayed.

At small batches a GPU computes a kernel in less time than Python takes to launch it. A graph launches all kernels of a
call at once. It reads its inputs from fixed places in memory, and so does all that changes from call to call:

- what depends on the time alone, and keys and values of the prompt (see `step_cache`): computed outside of the graph
  when the time or the prompt is a new one, and copied to where the graph reads them;
- the destinations that token merging draws: drawn before each replay as the hooks would, from the same generator.

A replay runs the kernels of the call that was recorded, on other numbers. Where that is not what the UNet would do, it
is called as always: see `GraphedUNet.can_replay`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.engine.blocks import LoweredUNet
from qdiff.engine.step_cache import ContextLayer, StepCache, TimeLayer
from tomesd.hooks import ATTRIBUTE, BlockMerging
from tomesd.merge import choose_destinations
from tomesd.network import blocks_of

MOST_TIMES = 1000  # whose results are kept: 90 MB for Stable Diffusion v1
WARM_UPS = 2  # calls before the recording, in which kernels are compiled and libraries take their workspaces


class GraphedUNet(nn.Module):
    """Calls a lowered UNet by CUDA graphs, one for each shape of its inputs.

    unet: a lowered QuantModel, or a LoweredUNet, on a GPU; it stays as it is. Results are those of the UNet, bit for
    bit, but for sums that merging adds in no fixed order on GPUs (`tomesd.merge.Matching.merge`). A call is recorded
    anew when merging was changed, or when `StepCache.clear` was called, as by a LoRA. Raises ValueError for a UNet that
    is not lowered.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        found = [module for module in unet.modules() if isinstance(module, LoweredUNet)]
        if not found:
            raise ValueError("only a lowered UNet can be recorded: lower it first")
        self._lowered = (found[0],)  # in a tuple: a submodule already
        self._blocks = tuple(blocks_of(found[0]).values())  # to look for them takes longer than to launch a graph
        self._recorded: dict[Any, _Recording] = {}

    @property
    def lowered(self) -> LoweredUNet:
        return self._lowered[0]

    def forget(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        self._recorded.clear()

    @torch.no_grad()
    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if context is None or y is not None or not self.can_replay(x):
            return self.unet(x, timesteps, context=context, y=y)
        with torch.cuda.device(x.device):
            return self._replayed(x, timesteps, context)

    def _replayed(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        autocast, mergings = torch.get_autocast_dtype("cuda"), self._mergings()
        key = (x.shape, x.dtype, x.device, context.shape, context.dtype, timesteps.dtype, autocast, tuple(mergings))
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.changes != self.lowered.step_cache.changes:
            recorded = None
        times, is_known = _read(timesteps, context, None if recorded is None else recorded.context)
        if any(time != times[0] for time in times):
            return self.unet(x, timesteps, context=context)
        if recorded is None:
            self._recorded.clear()  # one at a time: each holds the memory of a call
            recorded = self._recorded[key] = _Recording.of(self.unet, self.lowered, x, timesteps, context, mergings)
            is_known = True
        return recorded.replay(x, times[0], timesteps, None if is_known else context)

    def _mergings(self) -> list[BlockMerging]:
        """Return the merging of each block that has one, in the order of the network."""
        found = [vars(block).get(ATTRIBUTE) for block in self._blocks]
        return [merging for merging in found if merging is not None]

    def can_replay(self, x: Tensor) -> bool:
        """Return whether a replay computes what the UNet would for latents like x.

        Not on CPUs; not without autocast, as float32 takes another way through the blocks; not where features are
        cached (`feature_cache`); and not where merging depends on the step or on other blocks, or is pinned.
        """
        if x.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return False
        if self.lowered.feature_cache is not None:
            return False
        shared = {merging.model for merging in self._mergings()}
        return not any(each.pinned or each.options.follows_others for each in shared)


def _read(timesteps: Tensor, context: Tensor, known: Tensor | None) -> tuple[list[float], bool]:
    """Return the times, and whether the context is equal to the one that is `known`. This waits for the GPU once."""
    if known is None:
        return timesteps.tolist(), False
    *times, is_known = torch.cat([timesteps.double(), (context == known).all().double().view(1)]).tolist()
    return times, bool(is_known)


@dataclass(kw_only=True)
class _Recording:
    """A graph and the tensors that it reads and writes.

    of_time: the results of the present time, one after the other, of `layers`; the LoweredUNet itself has the time's
    embedding. kept: those of all times so far. of_context: the results for the present context by layer, with the
    function that makes them. draws: of each block that draws, its merging and its grid (w, h). drawn: the destinations
    of all of them, one after the other. changes: the step cache's.
    """

    lowered: LoweredUNet
    graph: torch.cuda.CUDAGraph
    x: Tensor
    context: Tensor
    output: Tensor
    time: float | None
    layers: list[nn.Module]
    of_time: Tensor
    kept: dict[float, Tensor]
    of_context: list[tuple[Tensor, Callable[[Tensor], Tensor]]]
    draws: list[tuple[BlockMerging, tuple[int, int]]]
    drawn: Tensor
    changes: int

    @classmethod
    def of(
        cls,
        unet: nn.Module,
        lowered: LoweredUNet,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        mergings: list[BlockMerging],
    ) -> "_Recording":
        """Record a call. The generator that draws destinations is where it was before, afterwards."""
        x, context = x.clone(), context.clone()
        cache, time = lowered.step_cache, timesteps.float()[0].item()
        before = {merging.model: merging.model.generator.get_state() for merging in mergings}
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        graph = torch.cuda.CUDAGraph()
        # Within the walk all that depends on the time or the context alone is computed by the first call, and kept: the
        # recorded call only reads it.
        with cache.walk([time]):
            cache.clear()
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    unet(x, timesteps, context=context)
            torch.cuda.current_stream(x.device).wait_stream(stream)
            layers, of_time = _put_together(cache.results_of_time(time))
            draws, drawn = _draw_fixed(mergings, x.device)
            # Times on the CPU can be compared without waiting for the GPU. Their embedding is kept.
            on_cpu = timesteps.cpu()
            with torch.cuda.graph(graph):
                output = unet(x, on_cpu, context=context)
            of_context = _results_of_context(cache)
            cache.clear()  # these tensors will hold results of other times: they are this graph's alone
        for shared, state in before.items():
            shared.generator.set_state(state)
        for merging, _ in draws:
            merging.drawn = None
        return cls(
            lowered=lowered, graph=graph, x=x, context=context, output=output, time=time, layers=layers,
            of_time=of_time, kept={time: of_time.clone()}, of_context=of_context, draws=draws, drawn=drawn,
            changes=cache.changes,
        )  # fmt: skip

    def replay(self, x: Tensor, time: float, timesteps: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of the UNet. time: the one of all samples. context: None for that of the last replay."""
        self.x.copy_(x)
        if context is not None:
            self.context.copy_(context)
            for place, compute in self.of_context:
                place.copy_(compute(self.context))
        if time != self.time:
            self._set_time(time, timesteps)
        if self.draws:
            self.drawn.copy_(_drawn_anew(self.draws), non_blocking=True)
        self.graph.replay()
        return self.output.clone()

    def _set_time(self, time: float, timesteps: Tensor) -> None:
        if time not in self.kept:
            if len(self.kept) >= MOST_TIMES:
                self.kept.clear()
            with torch.autocast("cuda", enabled=False):
                emb = self.lowered.embed_time(timesteps[:1], torch.float32)
                made = [layer.layer(emb) if isinstance(layer, TimeLayer) else emb for layer in self.layers]
                self.kept[time] = torch.cat([each.flatten() for each in made])
        self.of_time.copy_(self.kept[time])
        self.time = time


def _put_together(results: dict[nn.Module, Tensor]) -> tuple[list[nn.Module], Tensor]:
    """Move results into one tensor, so that one copy replaces all; return their layers and that tensor."""
    together = torch.cat([each.flatten() for each in results.values()])
    parts = together.split([each.numel() for each in results.values()])
    for (layer, result), part in zip(list(results.items()), parts, strict=True):
        results[layer] = part.view_as(result)
    return list(results), together


def _draw_fixed(
    mergings: list[BlockMerging], device: torch.device
) -> tuple[list[tuple[BlockMerging, tuple[int, int]]], Tensor]:
    """Let each block that draws take its destinations from a part of one tensor in the next call.

    Return these blocks' mergings with their grids (w, h), and the tensor.
    """
    # (merging, (the number of the call, w, h), destinations) of those that drew in the last call
    last = [(merging, *merging.drawn) for merging in mergings if merging.drawn is not None]
    last = [(merging, key, choice) for merging, key, choice in last if key[0] == merging.model.forwards]
    together = torch.cat([torch.empty(0, dtype=torch.long), *(choice.flatten() for _, _, choice in last)]).to(device)
    parts = together.split([choice.numel() for _, _, choice in last])
    for (merging, (call, w, h), choice), part in zip(last, parts, strict=True):
        merging.drawn = ((call + 1, w, h), part.view_as(choice))
    return [(merging, (w, h)) for merging, (_, w, h), _ in last], together


def _drawn_anew(draws: list[tuple[BlockMerging, tuple[int, int]]]) -> Tensor:
    """Return the destinations that the blocks would draw in the next call, one after the other, on the CPU."""
    choices = []
    for merging, (w, h) in draws:
        options = merging.model.options
        choices.append(choose_destinations(w, h, options.sx, options.sy, merging.model.generator).flatten())
    return torch.cat(choices)


def _results_of_context(cache: StepCache) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Return what the cache keeps of the context, with the functions that compute it anew."""
    of_context = []
    for layer, (result, how) in cache.results_of_context().items():
        assert isinstance(layer, ContextLayer)
        of_context.append((result, partial(_of_context, layer, how)))
    return of_context


def _of_context(layer: ContextLayer, how: Any, context: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return layer.compute(context, how)
