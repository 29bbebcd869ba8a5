"""A short form of the torture: a kill, a signal, a small disk and two runs at once for the quickest commands."""

import os
import signal
from dataclasses import replace

import pytest

from tests.torture.faults import Torturer
from tests.torture.subjects import SUBJECTS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]
BAD = """import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
with open(folder / "a.json", "w") as file:
    file.write("{")
    file.flush()
    time.sleep(2)
    file.write("}")
"""
BY_NAME = {subject.name: subject for subject in SUBJECTS}


def test_a_drawing_survives(tmp_path):
    torturer, subject = Torturer(tmp_path, seed=1), BY_NAME["generation"]
    for outcome in (
        torturer.stop(subject, signal.SIGKILL, 1),
        torturer.stop(subject, signal.SIGTERM, 1),
        torturer.full_disk(subject),
        torturer.no_folder(subject),
        torturer.two_at_once(subject),
    ):
        assert outcome.bad == [], outcome.fault


def test_the_torture_sees_what_is_wrong(tmp_path):
    """A command that writes its results bit by bit, and replaces them, must be found out."""
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    bad = replace(BY_NAME["generation"], name="bad", script=str(script), flags=lambda folder: (folder,))
    bad = replace(bad, resumed=lambda folder: (), results=lambda folder: {"a": str((folder / "a.json").exists())})
    outcome = Torturer(tmp_path, seed=3).stop(bad, signal.SIGKILL, 3)
    assert any("broken: a.json" in line for line in outcome.bad)
