"""The parent's side of `worker`: start such a process, ask it, end it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from dsdiff.models.registry import ROOT

PATIENCE = 10.0  # seconds that a process has to end by itself


class WorkerError(ChildProcessError):
    """A worker refused a request, or ended; the message says why, in one line."""


class WorkerProcess:
    """A running `dsdiff.benchmark.worker`. Use it as a context manager, or call `close`."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            python_command("dsdiff.benchmark.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            env=python_environment(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str, **values: Any) -> Any:
        """Send a request (see `Worker`) and return the reply. Raises WorkerError if there is none."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({"ask": request, **values}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:  # the process is gone, and its end of the pipe
            line = ""
        if not line:
            raise WorkerError(self._ending())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["reply"]

    def close(self) -> None:
        """End the process: it ends itself when its stdin does; one that does not is killed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # the process is gone, and cannot take what was not written yet
                    pipe.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ending(self) -> str:
        """Return how the process ended, and the last line that it wrote to stderr."""
        status = self._process.wait()
        how = f"its process ended by {signal.Signals(-status).name}" if status < 0 else f"its process ended ({status})"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last}" if last else how


def python_command(module: str, *options: str) -> list[str]:
    """Return the command that runs a module of ours, with these options of Python.

    -P keeps the current folder off Python's path, where any file could take the place of a module.
    """
    return [sys.executable, "-P", *options, "-m", module]


def python_environment() -> dict[str, str]:
    """Return our environment variables, with this repository on Python's path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
