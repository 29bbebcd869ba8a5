"""The data of a calibration: inputs of the UNet, recorded while pictures are drawn."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.fileio import write_atomically
from ldm.tensor_files import check_whole, save_tensors
from qdiff.checkpoint_qdiff import read_tensors
from qdiff.finite import named


@dataclass(frozen=True)
class CalibrationSet:
    """N inputs of a UNet: x [N, C, h, w], t [N], context [N, M, D] or None for a model without one.

    facts: their origin, as plain values.
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
        for name, part in zip(("x", "t", "context"), parts, strict=False):
            bad = (~part.isfinite()).reshape(len(part), -1).any(1).nonzero()
            if len(bad):
                raise ValueError(f"calibration data holds NaN or infinite values: {name} of {self.name(int(bad[0]))}")

    def __len__(self) -> int:
        return len(self.x)

    def name(self, i: int) -> str:
        """Return sample i in words, with its timestep."""
        return f"sample {i} of {len(self)} (timestep {float(self.t[i]):g})"

    def batch(self, part: slice, device: torch.device) -> tuple[Tensor, ...]:
        """Return the UNet's arguments x, t and context (if there is one) for the samples `part`, on `device`."""
        tensors = (self.x, self.t) if self.context is None else (self.x, self.t, self.context)
        return tuple(tensor[part].to(device) for tensor in tensors)

    def subset(self, n: int, seed: int) -> "CalibrationSet":
        """Return n samples chosen at random by `seed`, in their original order; all of them if there are no more."""
        if n >= len(self):
            return self
        return self._chosen(self._permutation(seed)[:n].sort().values)

    def shuffled(self, seed: int) -> "CalibrationSet":
        """Return all samples in an order drawn by `seed`."""
        return self._chosen(self._permutation(seed))

    def _permutation(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _chosen(self, numbers: Tensor) -> "CalibrationSet":
        context = None if self.context is None else self.context[numbers]
        return CalibrationSet(self.x[numbers], self.t[numbers], context, self.facts)

    def save(self, path: Path) -> None:
        """Write a .safetensors file, atomically."""
        tensors = {"x": self.x, "t": self.t} | ({} if self.context is None else {"context": self.context})
        facts = {"facts": json.dumps(self.facts)}
        write_atomically(path, lambda temporary: save_tensors(tensors, temporary, facts))

    @classmethod
    def load(cls, path: str | Path, steps: int | None = None, per_step: int | None = None) -> "CalibrationSet":
        """Read what `save` wrote, or a file in Q-Diffusion's layout.

        steps, per_step: how many timesteps of Q-Diffusion's file are kept, evenly spread over the trajectory, and how
        many samples of each, the first ones. None keeps all; our own files are always kept whole. Raises ValueError for
        a file of another kind, FileNotFoundError for a missing one.
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
        check_whole(path)
        if not {"x", "t"} <= tensors.keys() <= {"x", "t", "context"}:
            raise ValueError(f"{str(path)!r} is no calibration data: it holds {', '.join(sorted(tensors))}")
        with named(repr(str(path))):
            return cls(tensors["x"], tensors["t"], tensors.get("context"), facts)


def from_qdiffusion(
    content: Mapping[str, Any], source: str, steps: int | None = None, per_step: int | None = None
) -> CalibrationSet:
    """Make a CalibrationSet from Q-Diffusion's layout: `xs`, `ts`, and for a conditional model `cs` and `ucs`.

    Each of them has one entry per timestep, which holds the samples of that step. With `ucs` each sample is used twice:
    with its prompt and without. steps, per_step: see `CalibrationSet.load`. Raises ValueError for another layout.
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
    with named(repr(source)):
        return CalibrationSet(x.repeat(copies, 1, 1, 1), t.repeat(copies), context, {"data": Path(source).name})


def chosen_calls(calls: int, steps: int) -> list[int]:
    """Return `steps` of the numbers 0..calls-1, evenly spread; all of them if there are no more."""
    steps = min(steps, calls)
    return [i * calls // steps for i in range(steps)]


@contextmanager
def recorded_inputs(unet: nn.Module, calls: list[int]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Record the UNet's arguments (x, t, context) within the block, as float32 copies on the CPU.

    calls: the numbers of the calls to record, counted from 0. The list has one entry per recorded call.
    """
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
