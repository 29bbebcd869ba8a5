"""The request for a picture, and the times that its process tells. Nothing here imports torch."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

PROMPT = "a red circle on a blue background"
SEED = 42
PHASES = ("start", "text", "steps", "decoding", "png")


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """One picture, drawn in a process of its own.

    name: an engine or a peer. ratio: the share of tokens to merge. sampler, steps, scale: as of DrawOptions; steps are
    those that are really taken. tiny: whether a tiny decoder makes the picture. config: the model's yaml. ckpt: the
    file of its weights, or a bundle. tokenizer: a folder, None for the model's own. files: all others that are read, by
    what they hold: the "cali_ckpt" of a quantized engine, the "tiny" decoder, or those of a peer. png: the picture to
    write. device, threads: see BenchmarkOptions.
    """

    name: str
    ratio: float
    sampler: str
    steps: int
    scale: float | None
    config: str
    ckpt: str
    tokenizer: str | None
    files: Mapping[str, str] = field(default_factory=dict)
    png: str
    device: str
    threads: int | None
    tiny: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class PictureTold:
    """The times of a picture, in seconds, as its process tells them.

    ready, done: the time of day at which the model was loaded, and at which the PNG was on the disk. phases: the length
    of those of PHASES but the start and the steps. steps: the length of each step. peak_bytes: the most resident memory
    of the process. facts: what the row should be read with, in words.
    """

    ready: float
    done: float
    phases: dict[str, float]
    steps: list[float]
    peak_bytes: int | None
    facts: str


class Clock:
    """Divides the time of a process into phases: each `lap` ends one, and the next begins there.

    The first step, and all that stands between the text and it, is one lap.
    """

    def __init__(self) -> None:
        self.ready_at, self._last = 0.0, 0.0
        self.phases: dict[str, float] = {}
        self.steps: list[float] = []

    def ready(self) -> None:
        """Note that the model is loaded: the start ends here."""
        self.ready_at, self._last = time.time(), time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        self.phases[phase] = self.phases.get(phase, 0.0) + self._passed()

    def step(self) -> None:
        """Note the end of a step."""
        self.steps.append(self._passed())

    def told(self, facts: str) -> PictureTold:
        """Return all that was measured. Call it when the PNG is on the disk."""
        done = time.time()
        phases, steps = self.phases, self.steps
        return PictureTold(
            ready=self.ready_at, done=done, phases=phases, steps=steps, peak_bytes=peak_resident(), facts=facts
        )

    def _passed(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def peak_resident() -> int | None:
    """Return the most bytes of memory that this process held; None where the system does not tell.

    Linux counts in `getrusage` what the process that started this one held, too, and so its own file is asked first.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        from dsdiff.environment import peak_memory

        return peak_memory()
