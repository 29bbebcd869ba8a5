"""Peak memory: of a process of its own, sampled from outside."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from dsdiff.benchmark import memory
from dsdiff.benchmark.memory import PeakMemory, peak_alone
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source

HOLD = """
import sys
for line in sys.stdin:
    held = b"x" * int(line)
    del held
    print(flush=True)
"""


def test_the_most_that_a_process_held_while_watched_counts():
    peaks = []
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for megabytes in (300, 1, 100):
            with PeakMemory(process.pid) as peak:
                for _ in range(5):  # each takes longer than the time between two looks
                    process.stdin.write(f"{megabytes}000000\n")
                    process.stdin.flush()
                    process.stdout.readline()
            peaks.append(peak.bytes)
        process.stdin.close()
    assert peaks[0] > 250e6, peaks
    assert peaks[1] < 50e6, peaks  # what was held before does not count
    assert 90e6 < peaks[2] < 150e6, peaks


def test_watching_ends_with_the_process():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    with PeakMemory(process.pid):
        process.wait()


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own(tiny_config, tmp_path):
    source = Source.read(tiny_config, True, torch.device("cpu"))
    peak = peak_alone("bf16", source, weight_bit=4, outdir=tmp_path / "out", seconds=0.2)
    assert 50e6 < peak < 5e9
    assert not (tmp_path / "out").exists()


def test_an_engine_that_fails_is_named(tiny_config, tmp_path, monkeypatch):
    class Killed:
        pid = os.getpid()

        def ask(self, request, **values):
            raise WorkerError("its process ended by SIGKILL")

    monkeypatch.setattr(memory, "start", lambda source, **others: nullcontext(Killed()))
    source = Source.read(tiny_config, True, torch.device("cpu"))
    with pytest.raises(WorkerError) as failed:
        peak_alone("int8", source, weight_bit=4, outdir=tmp_path, seconds=0)
    assert str(failed.value) == "the memory of int8 cannot be measured: its process ended by SIGKILL"
