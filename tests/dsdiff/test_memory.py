"""The peak of this process's memory: what is its own, and what pages of mapped files add to it."""

import mmap
import sys
import time

import numpy as np
import pytest

from dsdiff.memory import OWN_INTERVAL, PeakMemory

SIZE = 200 * 10**6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of files are told apart on Linux")
def test_mapped_files_are_not_its_own(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(SIZE))
    with PeakMemory() as before:
        time.sleep(3 * OWN_INTERVAL)
    with PeakMemory() as mapped, (tmp_path / "weights").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert not np.frombuffer(pages, np.uint8).any()
        time.sleep(3 * OWN_INTERVAL)
    del pages
    with PeakMemory() as held:
        numbers = np.ones(SIZE, np.uint8)
        time.sleep(3 * OWN_INTERVAL)
        del numbers
    slack = 0.2 * SIZE
    assert mapped.bytes > before.bytes + SIZE - slack and mapped.own < before.own + slack
    assert held.own > before.own + SIZE - slack
    assert held.bytes >= held.own > 0
    mapped.own, mapped.bytes = 6_400_000_000, 13_500_000_000
    assert str(mapped) == "6.40 GB of its own memory, 13.50 GB with mapped files"
