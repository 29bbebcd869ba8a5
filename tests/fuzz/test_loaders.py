"""Damaged and hostile files before each loader: read, or refused in one line; no other error, no code, no hang.

DSDIFF_FUZZ=N tries N variants of each file in place of a few; `make fuzz` does.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsdiff import ModelOptions, find_model
from ldm.modules.encoders.prompt_syntax import parse_weights
from tests.fuzz.mutations import damaged_bytes, damaged_header, damaged_values
from tests.fuzz.targets import Target, targets

FEW = 12  # variants of a file
TRIES = int(os.environ.get("DSDIFF_FUZZ", FEW))
SECONDS = 5  # a loader that takes longer hangs
# Shrinking takes long where a loader does; the first example says enough.
FUZZ = settings(
    max_examples=TRIES,
    derandomize=TRIES == FEW,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def loaders(small_model, tmp_path_factory):
    config, ckpt = small_model
    spec = find_model(ModelOptions(config=config, ckpt=ckpt))
    return targets(spec, tmp_path_factory.mktemp("targets"))


@contextmanager
def no_hang(what: str) -> Iterator[None]:
    """Raise an AssertionError in the block after SECONDS."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"{what} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load(target: Target, content: bytes, folder: Path) -> None:
    """Let a loader read this content: any error but those of bad input fails the test."""
    path = folder / f"file{target.suffix}"
    path.write_bytes(content)
    with no_hang(target.name):
        try:
            target.load(path)
        except (ValueError, OSError) as error:
            line = str(error)
            assert line and len(line) < 3000 and "\n" not in line, f"{target.name}: {line[:200]!r}"


def check(target: Target, variants: st.SearchStrategy[bytes], folder: Path) -> None:
    """Let a loader read TRIES variants of its file."""

    @FUZZ
    @given(variants)
    def each(content):
        load(target, content, folder)

    each()


def test_whole_files_are_read(loaders, tmp_path):
    for target in loaders:
        path = tmp_path / f"file{target.suffix}"
        path.write_bytes(target.content)
        target.load(path)


@pytest.mark.slow
def test_damaged_bytes(loaders, tmp_path):
    for target in loaders:
        check(target, damaged_bytes(target.content), tmp_path)


@pytest.mark.slow
def test_damaged_values(loaders, tmp_path):
    for target in loaders:
        if target.values is not None:
            values, write = target.values
            variants = damaged_values(values).map(write)
        elif target.header is not None:
            variants = damaged_header(target.content, target.header)
        else:
            continue
        check(target, variants, tmp_path)


def test_any_text_is_a_prompt():
    @settings(max_examples=10 * TRIES, derandomize=TRIES == FEW, deadline=None, database=None)
    @given(st.one_of(st.text(), st.text(alphabet="()[]:\\1.5 aB,", max_size=60)))
    def check(text):
        with no_hang("a prompt"):
            pieces = parse_weights(text)
        assert all(isinstance(piece.text, str) for piece in pieces)

    check()
