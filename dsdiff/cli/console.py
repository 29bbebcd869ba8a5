"""The console of a command: its parser, its exit status and error lines, its log. Nothing here imports torch."""

import argparse
import functools
import logging
import logging.handlers
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from dsdiff.cli.steady import steady_streams, stop_signals
from dsdiff.errors import is_out_of_memory

PACKAGES = ("dsdiff", "ldm", "tomesd", "qdiff")  # whose log lines are shown
logger = logging.getLogger("dsdiff")


# --- flags and errors --------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """A parser that reports bad flags in one line, and accepts no abbreviated flags."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a finite `kind` (int or float) in low..high."""
    what = "a whole number" if kind is int else "a number"
    limits = f"of {low} or more" if high == math.inf else f"in {low}..{high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")
        return value

    return parse


class Command(Protocol):
    """A command's entry: it takes the arguments, those of the process where none are given."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


def command(main: Callable[[list[str]], None]) -> Command:
    """Make `main(argv)` a command: an error becomes one line on stderr and an exit status.

    The status is 2 for bad input (with --verbose a traceback comes first). Ctrl-C, SIGTERM and SIGHUP end it with 128
    plus the number of the signal, and a line with the text of the KeyboardInterrupt.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else list(argv)
        with steady_streams(), stop_signals() as stop:
            try:
                main(argv)
            except KeyboardInterrupt as interrupt:
                _leave(stop.status, f"interrupted: {interrupt}" if str(interrupt) else "interrupted")
            except (ValueError, OSError, NotImplementedError, MemoryError, RuntimeError) as error:
                message = _describe(error)
                if message is None:
                    raise
                if "--verbose" in argv:
                    traceback.print_exc()
                _leave(2, f"error: {message}")

    return guarded


def _leave(status: int, line: str) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(status) from None


def _describe(error: Exception) -> str | None:
    """Return the line to print for bad input; None for an error that is a defect of the program."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {str(error.filename)!r}"
    if is_out_of_memory(error):
        return "out of memory: use smaller batches or smaller pictures"
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return None
    return str(error) or type(error).__name__


# --- logs --------------------------------------------------------------------------------------------------


class Log:
    """The log file of a run. Lines wait in memory until `open`, so that a run that never begins leaves no file."""

    def __init__(self) -> None:
        self._waiting = logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL + 1)
        self.handler: logging.Handler = self._waiting

    def open(self, path: Path) -> None:
        """Append all lines so far, and those to come, to the file `path`."""
        file = _LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.handler = file
        logging.getLogger().addHandler(file)
        logging.getLogger().removeHandler(self._waiting)
        self._waiting.setTarget(file)
        self._waiting.close()


class _LogFile(logging.FileHandler):
    """A log file that ends the run when it cannot be written: what was not logged cannot be known later."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of logging)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # told before, for the line that was being written
            super().close()


class _Console(logging.Handler):
    """Writes to stdout, past the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stdout)


@contextmanager
def logs(verbose: bool) -> Iterator[Log]:
    """Send our packages' log lines to stdout (with `verbose` the detailed ones too) and to a log within the block."""
    root, log = logging.getLogger(), Log()
    console = _Console(logging.DEBUG if verbose else logging.INFO)
    root.addHandler(console)
    root.addHandler(log.handler)
    levels = {name: logging.getLogger(name).level for name in PACKAGES}
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        yield log
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in (console, log.handler):
            root.removeHandler(handler)
            handler.close()
