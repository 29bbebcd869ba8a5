"""What a calibration has taken: time, memory and disk, to be compared with the estimate."""

import time
from contextlib import suppress
from pathlib import Path

import psutil

from qdiff.capture import Cache


class Usage:
    """Time since `begin`; the most memory since then, beside what was held; the most bytes in a folder at a look.

    folder: what is in it at first is not counted. cache: its files are counted, also between looks.
    """

    def __init__(self, folder: Path, cache: Cache):
        self.folder, self.cache = folder, cache
        self.found = _bytes_in(folder)
        self.disk = 0
        self._began, self._held = time.monotonic(), 0

    def begin(self) -> None:
        """Begin to count time and memory."""
        _forget_peak()
        self._began, self._held = time.monotonic(), psutil.Process().memory_info().rss

    def look(self) -> None:
        """Notice the bytes in the folder, and those of the cache's files since the last look."""
        self.disk = max(self.disk, _bytes_in(self.folder) - self.found + self.cache.most_on_disk)
        self.cache.most_on_disk = 0

    @property
    def seconds(self) -> float:
        """Seconds since `begin`."""
        return time.monotonic() - self._began

    @property
    def memory(self) -> int:
        """Bytes of this process at most since `begin`, beyond those that it held then."""
        return max(_peak() - self._held, 0)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _forget_peak() -> None:
    """Let the system's peak of this process begin anew, where there is such a thing."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the most memory that this process has held since then; what it holds now, where that is not known."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return psutil.Process().memory_info().rss
