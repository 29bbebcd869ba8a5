"""The folder of finished steps, and how a calibration goes on from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff import calibrate as module
from qdiff.calibrate import calibrate
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.resume import ProgressFolder


@pytest.fixture(scope="module")
def data():
    tensors = load_file(Path(__file__).resolve().parents[1] / "goldens" / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:4], tensors["ts"][:4], tensors["cs"][:4])


def test_steps_are_dropped_from_a_number_on(tmp_path):
    folder = ProgressFolder(tmp_path / "progress")
    folder.begin({})
    for number in range(12):
        folder.save(number, {"a": torch.zeros(1)}, {})
    folder.drop_from(3)
    assert folder.finished() == 3 and folder.load(2) is not None and folder.load(11) is None and folder.begun


def test_what_followed_a_damaged_step_is_not_loaded_after_another_interruption(make_qnn, data, tmp_path):
    folder = ProgressFolder(tmp_path / "progress")
    folder.begin({})

    def steps():
        return calibrate(make_qnn(), data, None, cache=Cache(10**9, tmp_path), folder=folder)

    assert [step.phase for step, _ in steps()] == ["fitting", "ranges"]
    first = folder.folder / "step-0000.safetensors"
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    next(steps())  # the damaged step is done anew, and then comes the interruption
    assert first.read_bytes() == whole and folder.finished() == 1


def test_no_step_is_written_before_all_processes_have_looked_for_it(make_qnn, data, tmp_path, monkeypatch):
    events, folder = [], ProgressFolder(tmp_path / "progress")
    folder.begin({})
    load, save = folder.load, folder.save
    monkeypatch.setattr(folder, "load", lambda number: events.append(f"load {number}") or load(number))
    monkeypatch.setattr(folder, "save", lambda number, *what: events.append(f"save {number}") or save(number, *what))
    monkeypatch.setattr(module, "barrier", lambda: events.append("barrier"))
    list(calibrate(make_qnn(), data, None, cache=Cache(10**9, tmp_path), folder=folder))
    assert events[:3] == ["load 0", "barrier", "save 0"]
    events.clear()
    folder.drop_from(1)
    list(calibrate(make_qnn(), data, None, cache=Cache(10**9, tmp_path), folder=folder))
    assert events[:4] == ["load 0", "load 1", "barrier", "save 1"]
