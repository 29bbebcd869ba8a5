"""A signal ends a training at a place from which it goes on, whichever process it reaches."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

COMMAND = Path(__file__).resolve().parents[3] / "scripts/train.py"
LAST = Path("runs/reader/checkpoints/last.ckpt")
LOG = Path("log.txt")


@contextmanager
def training(*arguments: object) -> Iterator[subprocess.Popen]:
    """Run a training of the reader within the block, which begins after its first checkpoint."""
    line = [sys.executable, COMMAND, "--device", "cpu", "--config", "reader.yaml", "--export", "", *arguments]
    # A test run that was started in the background ignores Ctrl-C, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with LOG.open("w") as log:
        process = subprocess.Popen(
            list(map(str, line)), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    signal.signal(signal.SIGINT, before)
    try:
        end = time.monotonic() + 300
        while not LAST.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert LAST.exists(), LOG.read_text()
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_ends_all_processes_after_a_step(configs):
    for case in ((1, signal.SIGINT, os.killpg), (2, signal.SIGINT, os.killpg), (2, signal.SIGTERM, os.kill)):
        devices, number, send = case
        with training("--max_steps", 100_000, "--devices", devices) as process:
            send(process.pid, number)
            assert process.wait(120) == 128 + number, (case, LOG.read_text())
        steps, said = torch.load(LAST, weights_only=True)["global_step"], LOG.read_text()
        assert 2 <= steps < 100_000 and f"interrupted: {steps} of 100000 steps are done" in said, (case, said)
        assert "Traceback" not in said, (case, said)
        if send is os.killpg:
            LAST.unlink()
    with training("--max_steps", steps + 1, "--devices", 2) as process:
        assert process.wait(120) == 0, LOG.read_text()
    assert torch.load(LAST, weights_only=True)["global_step"] == steps + 1
