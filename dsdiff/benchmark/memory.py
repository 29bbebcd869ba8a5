"""The memory that an engine needs to run: measured in a process of its own, as all else there would be counted."""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dsdiff.benchmark.variants import Engine
from dsdiff.pipeline import ROOT


def peak_alone(name: str, argv: Sequence[str]) -> int | None:
    """`running_peak` of an engine, in a new process. argv: the flags of this command."""
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *argv, "--child", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().rpartition("\n")[2] or f"it ended with status {result.returncode}"
        raise ChildProcessError(f"the memory of {name} cannot be measured: {last.removeprefix('error: ')}")
    return json.loads(result.stdout.rpartition("peak:")[2])


def tell_peak(engine: Engine) -> None:
    """What the new process does: print the peak for `peak_alone`."""
    print(f"peak:{json.dumps(running_peak(engine))}")


def running_peak(engine: Engine) -> int | None:
    """The most memory that is held during a call, without merging: of a GPU by torch, else by the whole process.

    What was held before, to build the engine, does not count. None where the system does not tell.
    """
    if not reset_peak(engine.device):
        return None
    with engine.running(0.0) as call:
        call()
    return peak_bytes(engine.device)


def reset_peak(device: torch.device) -> bool:
    """Let peak_bytes begin with what is held now; False where the system cannot."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError, AttributeError):  # what was freed, but is still ours, goes back (glibc)
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 is the high-water mark of resident memory (Linux)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
