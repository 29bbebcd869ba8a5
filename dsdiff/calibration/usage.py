"""Count the time, memory and disk that a calibration takes, to be compared with the estimate."""

import gc
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dsdiff.memory import PeakMemory
from ldm.half_storage import give_back_freed
from qdiff.capture import Cache


class Usage:
    """Counts within a `with` block: time, this process's memory beside what it held at first, bytes in a folder.

    folder: what is in it at first is not counted. cache: its files are counted, also between looks.
    """

    def __init__(self, folder: Path, cache: Cache):
        self.folder, self.cache = folder, cache
        self.disk = 0
        self._found = _bytes_in(folder)
        self._began = 0.0
        self._peak = PeakMemory()
        self._held = 0

    def __enter__(self) -> "Usage":
        gc.collect()
        give_back_freed()
        with PeakMemory() as held:
            time.sleep(0.05)
        self._held = held.own
        self._began = time.monotonic()
        self._peak.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._peak.__exit__(kind, error, trace)

    def look(self) -> None:
        """Notice the bytes in the folder, and those of the cache's files since the last look."""
        self.disk = max(self.disk, _bytes_in(self.folder) - self._found + self.cache.most_on_disk)
        self.cache.most_on_disk = 0

    @property
    def seconds(self) -> float:
        """Seconds since the block began."""
        return time.monotonic() - self._began

    @property
    def memory(self) -> int:
        """Bytes of its own memory that the process has held at most, beyond those at first."""
        return max(self._peak.own - self._held, 0)


def _bytes_in(folder: Path) -> int:
    """Return the bytes of all files below a folder. Other processes may rename and delete them meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
