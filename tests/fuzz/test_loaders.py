"""Damaged and hostile files before each loader: read, or refused in one line; no other error, no code, no hang.

A few of each; tests/fuzz/run.py tries many, and counts them.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsdiff import ModelOptions, find_model
from ldm.modules.encoders.prompt_syntax import parse_weights
from tests.fuzz.loading import damages, load, no_hang
from tests.fuzz.targets import Target, targets

TRIES = 12  # variants of a file
# Shrinking takes long where a loader does; the first example says enough.
FUZZ = settings(
    max_examples=TRIES,
    derandomize=True,
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


def check(target: Target, kind: str, folder: Path) -> None:
    """Let a loader read TRIES variants of its file."""
    variants = damages(target).get(kind)
    if variants is None:
        return

    @FUZZ
    @given(variants)
    def each(content):
        load(target, content, folder)

    each()


def test_whole_files_are_read(loaders, tmp_path):
    for target in loaders:
        assert load(target, target.content, tmp_path), target.name


@pytest.mark.slow
def test_damaged_bytes(loaders, tmp_path):
    for target in loaders:
        check(target, "bytes", tmp_path)


@pytest.mark.slow
def test_damaged_values(loaders, tmp_path):
    for target in loaders:
        check(target, "values", tmp_path)


def test_any_text_is_a_prompt():
    @settings(max_examples=10 * TRIES, derandomize=True, deadline=None, database=None)
    @given(st.one_of(st.text(), st.text(alphabet="()[]:\\1.5 aB,", max_size=60)))
    def check(text):
        with no_hang("a prompt"):
            pieces = parse_weights(text)
        assert all(isinstance(piece.text, str) for piece in pieces)

    check()
