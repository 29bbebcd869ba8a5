"""The most memory that a process holds, its own apart from files that are mapped."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil

INTERVAL = 0.001  # seconds between two looks at another process
OWN_INTERVAL = 0.01  # and at this one, whose work each look interrupts


class PeakMemory:
    """Watch a process within a `with` block: this one, or that with the number `pid`.

    bytes: the most resident memory that it was seen to have. own: the most of it that was its own; the rest is pages of
    files, such as mapped weights, which the system takes back when it needs room. Where the system does not tell pages
    of files apart, all is its own.
    """

    def __init__(self, pid: int | None = None):
        self._process = psutil.Process(pid)
        self._interval = OWN_INTERVAL if pid is None else INTERVAL
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = self.own = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                held = self._process.memory_info()
            except psutil.Error:  # it has ended
                return
            self.bytes = max(self.bytes, held.rss)
            self.own = max(self.own, held.rss - getattr(held, "shared", 0))
            time.sleep(self._interval)

    def __str__(self) -> str:
        return f"{self.own / 1e9:.2f} GB of its own memory, {self.bytes / 1e9:.2f} GB with mapped files"
