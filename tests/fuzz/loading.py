"""Let a loader read a damaged file: what it may do, and what is a fault."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.mutations import Content, damaged_bytes, damaged_header, damaged_values
from tests.fuzz.targets import Target

SECONDS = 5  # of a CPU: a loader that takes more hangs


@contextmanager
def no_hang(what: str) -> Iterator[None]:
    """Raise an AssertionError in the block after SECONDS of a CPU, which other work on the machine does not take."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"{what} takes more than {SECONDS} s of a CPU")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def load(target: Target, content: bytes, folder: Path) -> bool:
    """Let a loader read this content. Return True if it did, False if it refused it as bad input.

    Any other error goes on; a message that is not one short line, and a hang, are AssertionErrors.
    """
    path = folder / f"file{target.suffix}"
    path.write_bytes(content)
    with no_hang(target.name):
        try:
            target.load(path)
        except (ValueError, OSError) as error:
            line = str(error)
            assert line and len(line) < 3000 and "\n" not in line, f"{target.name}: {line[:200]!r}"
            return False
    return True


def damages(target: Target) -> dict[str, st.SearchStrategy[bytes]]:
    """Return the ways to damage a target's file: "bytes" and, for files of values, "values"."""
    content = Content(target.content)
    found = {"bytes": damaged_bytes(content)}
    if target.values is not None:
        values, write = target.values
        found["values"] = damaged_values(values).map(write)
    elif target.header is not None:
        found["values"] = damaged_header(content, target.header)
    return found
