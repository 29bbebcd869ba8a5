"""Capture the inputs or the output of a part of the model, over all of a calibration set."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from qdiff.calibration_set import CalibrationSet
from qdiff.distributed import rank, sum_over_ranks, world_size
from qdiff.finite import is_finite
from qdiff.quant_model import QuantModel

Progress = Callable[[int], object]  # called with the number of samples, or steps, done since the last call


class _Stop(Exception):  # noqa: N818
    """End a forward pass, as the unit has been reached."""


class Cache:
    """Storage of captured activations: in memory up to `limit` bytes in all, beyond that in files in `folder`."""

    def __init__(self, limit: int, folder: Path):
        self.limit = limit
        self.folder = folder
        self.held = 0
        self.files = 0
        self.on_disk = 0  # bytes in files
        self.most_on_disk = 0  # of them at a time, since someone set it to 0

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros of `shape`, in float32."""
        size = 4 * math.prod(shape)
        if self.held + size <= self.limit:
            self.held += size
            return torch.zeros(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"activations-{rank()}-{self.files}.bin"
        self.files += 1
        self.on_disk += size
        self.most_on_disk = max(self.most_on_disk, self.on_disk)
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=shape))

    def sweep(self) -> None:
        """Delete what killed processes left, whichever they were. The first process does it, before any allocates."""
        if rank() == 0:
            self._delete("activations-*.bin")

    def clear(self) -> None:
        """Drop all tensors, which must not be used any more, and delete this process's files."""
        self._delete(f"activations-{rank()}-*.bin")
        self.files = 0
        self.held = 0
        self.on_disk = 0

    def _delete(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink()
        with suppress(OSError):  # other processes may still have files in it
            self.folder.rmdir()


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
    """Return what `unit` receives, or with `output` what it returns, while the model runs on all of `data`.

    The result is float32 tensors [N, ...] from `cache`: one for each argument, or one for the output. The model runs in
    its present state, and each forward pass ends at the unit. Several processes share the batches. progress(n) is
    called when n more samples are done. Raises RuntimeError if the unit is not reached, and ValueError, which names the
    sample, for values that are NaN or infinite.
    """
    device = next(qnn.parameters()).device
    stores: list[Tensor] = []
    with _stopping_at(unit, output) as caught:
        for number, start in enumerate(range(0, len(data), batch_size)):
            # Every process computes the first batch, to know the shapes.
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
                if not is_finite(value):
                    bad = next((i for i, each in enumerate(value) if not is_finite(each)), 0)  # sums overflow together
                    what = "output" if output else "input"
                    raise ValueError(f"its {what} is NaN or infinite for {data.name(start + bad)}")
                if number or rank() == 0:  # all processes have the first batch, and they are summed below
                    store[place] = value.float().cpu()
            progress((place.stop - place.start) * world_size())
    sum_over_ranks(stores)
    return stores


@contextmanager
def _stopping_at(unit: nn.Module, output: bool) -> Iterator[list[Tensor]]:
    """End each forward pass at `unit` within the block, and put the unit's inputs or its output into the list."""
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
