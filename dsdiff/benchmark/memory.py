"""The memory that an engine needs to run, measured in a process of its own, where nothing else is counted."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from dsdiff.benchmark.peers import start
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source

INTERVAL = 0.001  # seconds between two looks at a process


def peak_alone(name: str, source: Source, *, weight_bit: int, outdir: Path, seconds: float) -> int:
    """Return the most bytes that are held during calls of an engine or peer, without merging.

    On a GPU it is the memory that torch holds there, else the resident memory of the whole process. What was held
    before, to build the engine, does not count. Raises WorkerError if the process fails.
    """
    with start(source, weight_bit=weight_bit, outdir=outdir) as process:
        try:
            process.ask("build", name=name)
            if source.device.type == "cuda":
                return process.ask("gpu_peak")
            with PeakMemory(process.pid) as peak:
                process.ask("time", ratio=0.0, seconds=seconds, warm=False, profiled=False)
        except WorkerError as error:
            raise WorkerError(f"the memory of {name} cannot be measured: {error}") from error
    return peak.bytes


class PeakMemory:
    """Watch another process within a `with` block; `bytes` is the most resident memory that it was seen to have."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.bytes = max(self.bytes, self._process.memory_info().rss)
            except psutil.Error:  # it has ended
                return
            time.sleep(INTERVAL)
