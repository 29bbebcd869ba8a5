"""Streams that never end a run, and signals that end it in order. Nothing here imports torch."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class SteadyStream:
    """A text stream in front of another: what that cannot show is escaped, and what it cannot take is dropped.

    A pipe whose reader has gone, a closed terminal or a full disk must not end a run of hours, whose results are
    files.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            cast(Any, stream).reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._drop()

    def _drop(self) -> None:
        """Let all that comes go nowhere, also what waits in the stream's buffer."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # a stream without a file
            self._stream = _nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # it lasts as long as the process


@contextmanager
def steady_streams() -> Iterator[None]:
    """Put steady streams in the place of stdout and stderr within the block."""
    before = sys.stdout, sys.stderr
    # A console that was closed before the start is None here.
    steady = [SteadyStream(_nowhere() if each is None else each) for each in before]
    sys.stdout, sys.stderr = cast(list[TextIO], steady)
    try:
        yield
    finally:
        for stream in steady:
            stream.flush()
        sys.stdout, sys.stderr = before


class Stop:
    """The signal that ended a run. number: of the signal; that of Ctrl-C until another one comes."""

    number: int = signal.SIGINT

    def __call__(self, number: int, frame: object) -> None:
        self.number = number
        raise KeyboardInterrupt

    @property
    def status(self) -> int:
        """Return the exit status that shells give a process that the signal ended."""
        return 128 + self.number


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, within the block.

    A signal that is ignored, as SIGHUP is under nohup, or that somebody else handles, stays so.
    """
    stop = Stop()
    ours = threading.current_thread() is threading.main_thread()
    caught = [each for each in STOP_SIGNALS if ours and signal.getsignal(each) == signal.SIG_DFL]
    for each in caught:
        signal.signal(each, stop)
    try:
        yield stop
    finally:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
