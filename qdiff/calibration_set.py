"""The data of a calibration: what the UNet is given while pictures are drawn, and what its parts make of it."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.fileio import write_atomically
from qdiff.checkpoint_qdiff import read_tensors
from qdiff.distributed import from_first_rank, rank, sum_over_ranks, world_size
from qdiff.quant_layer import Quantizer, UniformAffineQuantizer
from qdiff.quant_model import QuantModel, put_module

MOMENTUM = 0.95  # of running ranges
SAMPLED_VALUES = 2**16  # of an activation, for its range by mse

Progress = Callable[[int], object]  # called with what was done since the last call


# --- the inputs of the UNet --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationSet:
    """N inputs of a UNet: x [N, C, h, w], t [N], context [N, M, D] or None for a model without one.

    facts: where they come from, plain values.
    """

    x: Tensor
    t: Tensor
    context: Tensor | None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        parts = (self.x, self.t) if self.context is None else (self.x, self.t, self.context)
        if len({len(part) for part in parts}) != 1 or len(self.x) == 0:
            raise ValueError(f"calibration data must have as many x as t and context, got {[len(p) for p in parts]}")
        if self.x.ndim != 4 or self.t.ndim != 1 or (self.context is not None and self.context.ndim != 3):
            raise ValueError("calibration data must be x [N, C, h, w], t [N] and context [N, M, D]")
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError("calibration data holds NaN or infinite values")

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, part: slice, device: torch.device) -> tuple[Tensor, ...]:
        """The positional arguments of the UNet for some samples."""
        tensors = (self.x, self.t) if self.context is None else (self.x, self.t, self.context)
        return tuple(tensor[part].to(device) for tensor in tensors)

    def subset(self, n: int, seed: int) -> "CalibrationSet":
        """n samples drawn at random, in their order; all where there are no more."""
        if n >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        context = None if self.context is None else self.context[chosen]
        return CalibrationSet(self.x[chosen], self.t[chosen], context, self.facts)

    def save(self, path: Path) -> None:
        """Write a .safetensors; it is complete or not there."""
        tensors = {"x": self.x.contiguous(), "t": self.t.contiguous()}
        if self.context is not None:
            tensors["context"] = self.context.contiguous()
        facts = {"facts": json.dumps(self.facts)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=facts))

    @classmethod
    def load(cls, path: str | Path, steps: int | None = None, per_step: int | None = None) -> "CalibrationSet":
        """Read what `save` wrote, or a file in Q-Diffusion's layout.

        Of the latter, `steps` timesteps evenly spread over the trajectory are taken (None: all), and the first
        `per_step` samples of each. Raises ValueError for a file that is neither, FileNotFoundError without one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(2, "No such file", str(path))
        if path.suffix != ".safetensors":
            return from_qdiffusion(read_tensors(path), str(path), steps, per_step)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"calibration data {str(path)!r} cannot be read: {error}") from error
        if not {"x", "t"} <= tensors.keys() <= {"x", "t", "context"}:
            raise ValueError(f"{str(path)!r} is no calibration data: it holds {', '.join(sorted(tensors))}")
        return cls(tensors["x"], tensors["t"], tensors.get("context"), facts)


def from_qdiffusion(
    content: Mapping[str, Any], source: str, steps: int | None = None, per_step: int | None = None
) -> CalibrationSet:
    """Q-Diffusion's layout: `xs`, `ts`, and of a conditional model `cs` and `ucs`, one entry a timestep.

    Each entry holds the samples of that step; where `ucs` is there, each sample counts twice, with its prompt and
    without. Raises ValueError for anything else.
    """
    if not isinstance(content, Mapping) or not {"xs", "ts"} <= content.keys() <= {"xs", "ts", "cs", "ucs"}:
        raise ValueError(f"{source!r} is no calibration data: xs and ts, and perhaps cs and ucs, are expected")
    count = len(content["ts"])
    steps = min(steps or count, count)
    chosen = [i * count // steps for i in range(steps)]

    def gather(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(content[name][i])[:per_step] for i in chosen]).float()

    try:
        x, t = gather("xs"), gather("ts").flatten()
        branches = [gather(name) for name in ("cs", "ucs") if name in content]
    except (RuntimeError, TypeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"calibration data {source!r} is damaged: {error}") from error
    copies = max(len(branches), 1)
    context = torch.cat(branches) if branches else None
    return CalibrationSet(x.repeat(copies, 1, 1, 1), t.repeat(copies), context, {"data": Path(source).name})


def chosen_calls(calls: int, steps: int) -> list[int]:
    """`steps` of the numbers 0..calls-1, evenly spread; all where there are no more."""
    steps = min(steps, calls)
    return [i * calls // steps for i in range(steps)]


@contextmanager
def recorded_inputs(unet: nn.Module, calls: list[int]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Within the block, the arguments (x, t, context) of the UNet's calls number `calls` are put into the list."""
    kept: list[tuple[Tensor, ...]] = []
    wanted, seen = set(calls), 0

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal seen
        if seen in wanted:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            kept.append(tuple(value.detach().float().cpu().clone() for value in values))
        seen += 1

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


# --- what a unit is given and gives ------------------------------------------------------------------------


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass once the unit has been reached."""


class Cache:
    """Where captured activations lie: in memory up to `limit` bytes, beyond that in files in `folder`."""

    def __init__(self, limit: int, folder: Path):
        self.limit = limit
        self.folder = folder
        self.held = 0
        self.files = 0

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """float32 zeros."""
        size = 4 * math.prod(shape)
        if self.held + size <= self.limit:
            self.held += size
            return torch.zeros(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"activations-{rank()}-{self.files}.bin"
        self.files += 1
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=shape))

    def clear(self) -> None:
        """Forget all, and what a killed process left; tensors handed out must not be used any more."""
        for path in self.folder.glob(f"activations-{rank()}-*.bin"):
            path.unlink()
        with suppress(OSError):  # other processes' files
            self.folder.rmdir()
        self.files = 0
        self.held = 0


@torch.no_grad()
def capture(
    qnn: QuantModel,
    unit: nn.Module,
    data: CalibrationSet,
    batch_size: int,
    cache: Cache,
    *,
    output: bool = False,
    progress: Progress = lambda samples: None,
) -> list[Tensor]:
    """What `unit` is given when the model, in its present state, gets all of `data`; or, with `output`, what it gives.

    Returns one tensor [N, ...] for each argument, or a list with that of the output. The forward pass ends at the
    unit. Several processes share the batches. progress(samples) is called after each batch.
    """
    device = next(qnn.parameters()).device
    stores: list[Tensor] = []
    with _stopping_at(unit, output) as caught:
        for number, start in enumerate(range(0, len(data), batch_size)):
            # The first batch is for everyone: it tells the shapes.
            if number and number % world_size() != rank():
                continue
            place = slice(start, min(start + batch_size, len(data)))
            try:
                qnn(*data.batch(place, device))
            except _Stop:
                pass
            else:
                raise RuntimeError("the unit was not reached: it is not part of the model")
            if not stores:
                stores = [cache.allocate((len(data), *value.shape[1:])) for value in caught]
            for store, value in zip(stores, caught, strict=True):
                if number or rank() == 0:  # counted once
                    store[place] = value.float().cpu()
            progress((place.stop - place.start) * world_size())
    sum_over_ranks(stores)
    return stores


@contextmanager
def _stopping_at(unit: nn.Module, output: bool) -> Iterator[list[Tensor]]:
    """Within the block a forward pass ends at `unit`, and the list holds what it was given, or gave."""
    caught: list[Tensor] = []

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught[:] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        raise _Stop

    def on_output(module: nn.Module, args: tuple, result: Tensor) -> None:
        caught[:] = [result]
        raise _Stop

    hook = (
        unit.register_forward_hook(on_output) if output else unit.register_forward_pre_hook(on_input, with_kwargs=True)
    )
    try:
        yield caught
    finally:
        hook.remove()


# --- the ranges of activations -----------------------------------------------------------------------------


class Observer(nn.Module):
    """Stands in a quantizer's slot, hands its input on, and remembers what the range needs."""

    enabled = True  # attention computes its operands for us

    def __init__(self, quantizer: UniformAffineQuantizer, values_a_batch: int, seed: int, running: bool):
        super().__init__()
        self._quantizer = (quantizer,)
        self.running = running
        self.values_a_batch = values_a_batch
        self.generator = torch.Generator().manual_seed(seed)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.batch: list[Tensor] = []  # minimum and maximum of each call since the last batch
        self.drawn: list[Tensor] = []  # values of each call since the last batch
        self.values: list[Tensor] = []  # of the batches

    @property
    def quantizer(self) -> UniformAffineQuantizer:
        return self._quantizer[0]

    def forward(self, x: Tensor) -> Tensor:
        self.batch.append(torch.stack(x.detach().aminmax()).float().cpu())
        if self.quantizer.scale_method == "mse" and not self.running:
            self.drawn.append(self._draw(x.detach().flatten()).float().cpu())
        return x

    def _draw(self, values: Tensor) -> Tensor:
        chosen = torch.randint(len(values), (self.values_a_batch,), generator=self.generator)
        return values[chosen.to(values.device)]

    def end_batch(self) -> None:
        """Take in the extremes of a batch, which may have come in several calls."""
        if not self.batch:
            return
        extremes = torch.stack(self.batch)
        low, high = extremes[:, 0].min(), extremes[:, 1].max()
        self.batch.clear()
        if self.drawn:
            self.values.append(self._draw(torch.cat(self.drawn)) if len(self.drawn) > 1 else self.drawn[0])
            self.drawn.clear()
        if self.low is None:
            self.low, self.high = low, high
        elif self.running:
            self.low = self.low * MOMENTUM + low * (1 - MOMENTUM)
            self.high = self.high * MOMENTUM + high * (1 - MOMENTUM)
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def fit(self) -> None:
        """Set the quantizer's range from all that was seen. Raises ValueError if nothing was."""
        if self.low is None:
            raise ValueError("an activation was never computed: is the calibration data of this model?")
        if self.running:
            self.quantizer.set_range(self.low, self.high)
        else:  # the extremes belong to the data: the candidates are shrinkings of the full range
            self.quantizer.fit(torch.cat([self.low.view(1), self.high.view(1), *self.values]))


@torch.no_grad()
def fit_activations(
    qnn: QuantModel,
    data: CalibrationSet,
    batch_size: int,
    *,
    running: bool = False,
    seed: int = 0,
    progress: Progress = lambda samples: None,
) -> None:
    """Fit the ranges of all activations, attention operands included, to the whole of `data`.

    In one pass with quantized weights and float activations. By the quantizers' own method, or with `running` by
    Q-Diffusion's averages of minimum and maximum over the batches. progress(samples) is called after each batch.
    """
    device = next(qnn.parameters()).device
    batches = math.ceil(len(data) / batch_size)
    with qnn.quant_state(True, False), _observed(qnn, math.ceil(SAMPLED_VALUES / batches), seed, running) as observers:
        for start in range(0, len(data), batch_size):
            part = slice(start, min(start + batch_size, len(data)))
            qnn(*data.batch(part, device))
            for observer in observers:
                observer.end_batch()
            progress(part.stop - part.start)
    for observer in observers:
        observer.fit()
    from_first_rank([value for observer in observers for value in observer.quantizer.buffers()])


@contextmanager
def _observed(qnn: QuantModel, values_a_batch: int, seed: int, running: bool) -> Iterator[list[Observer]]:
    """Within the block Observers stand in the slots of all activation quantizers."""
    quantizers: dict[str, Quantizer] = qnn.act_quantizers()
    observers = {
        name: Observer(quantizer, values_a_batch, seed + i, running)
        for i, (name, quantizer) in enumerate(quantizers.items())
    }
    try:
        for name, observer in observers.items():
            put_module(qnn, name, observer)
        yield list(observers.values())
    finally:
        for name, quantizer in quantizers.items():
            put_module(qnn, name, quantizer)
