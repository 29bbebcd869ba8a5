"""The studio's line: order, limit, jobs that are stopped or given up before they begin, and its end."""

import shutil
import threading

import pytest

from dsdiff.models.registry import EMBEDDED
from dsdiff.options import ModelOptions
from dsdiff.server.job import BusyError, Job, StoppingError
from dsdiff.server.options import Limits, ModelChoice
from dsdiff.server.previews import LatentColors
from dsdiff.server.requests import split_loras
from dsdiff.server.shelf import Shelf
from dsdiff.server.studio import Studio


@pytest.fixture
def studio():
    """A studio that has read no model, for two jobs in line."""
    studio = Studio(Shelf(ModelChoice(model=ModelOptions(config=EMBEDDED), device="cpu")), Limits(queue=2))
    yield studio
    studio.close()


def test_jobs_are_done_in_order_and_no_more_wait_than_may(studio):
    done, go = [], threading.Event()
    first = studio.submit(Job("first", lambda job: go.wait(10) and done.append(1)))
    others = [studio.submit(Job("other", lambda job, i=i: done.append(i))) for i in (2, 3)]
    while studio.waiting() != 2:
        pass
    with pytest.raises(BusyError, match="2 requests wait already"):
        studio.submit(Job("too many", lambda job: None))
    go.set()
    for job in (first, *others):
        job.future.result(10)
    assert done == [1, 2, 3] and studio.waiting() == 0
    error = studio.submit(Job("wrong", lambda job: 1 / 0)).future.exception(10)
    assert isinstance(error, ZeroDivisionError)  # and the studio goes on
    assert studio.submit(Job("right", lambda job: 5)).future.result(10) == 5


def test_jobs_that_nobody_waits_for_are_left_out(studio):
    done, go = [], threading.Event()
    first = studio.submit(Job("first", lambda job: go.wait(10)))
    stopped, given_up = (studio.submit(Job("other", lambda job: done.append(1))) for _ in range(2))
    stopped.interrupt()
    assert given_up.future.cancel()
    go.set()
    first.future.result(10)
    assert isinstance(stopped.future.exception(10), StoppingError)
    assert studio.submit(Job("last", lambda job: 5)).future.result(10) == 5 and done == []


def test_the_end_refuses_all_that_wait(studio):
    begun = threading.Event()
    first = studio.submit(Job("first", lambda job: begun.set() or job.interrupted.wait(10)))
    begun.wait(10)
    waiting, given_up = (studio.submit(Job("other", lambda job: None)) for _ in range(2))
    given_up.future.cancel()
    studio.close()
    assert first.future.result(0) is True  # it was told to stop
    assert isinstance(waiting.future.exception(0), StoppingError)
    with pytest.raises(StoppingError):
        studio.submit(Job("late", lambda job: None))


def test_loras_are_taken_out_of_prompts():
    found = []
    prompt, loras = split_loras("a <lora:one:0.5>cat<lora:two>", lambda *lora: found.append(lora) or lora)
    assert prompt == "a cat" and loras == (("one", 0.5), ("two", 1.0)) and found == list(loras)
    assert split_loras(" a cat ", lambda *lora: lora) == (" a cat ", ())
    with pytest.raises(ValueError, match="<lora:one:x>: could not convert"):
        split_loras("<lora:one:x>", lambda *lora: lora)


def test_files_that_are_no_models_are_left_out(tmp_path, small_model):
    _, ckpt = small_model
    (tmp_path / "small.safetensors").symlink_to(ckpt)
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "folder").mkdir()
    choice = ModelChoice(model=ModelOptions(config=EMBEDDED), device="cpu", model_dir=tmp_path)
    shelf = Shelf(choice)
    assert [*shelf.entries] == [
        *(f"embedded{bits}" for bits in ("", " W4A8", " W8A8", " W4A8 dynamic")),
        "small",
    ]
    assert shelf.find("EMBEDDED w4a8").title == "embedded W4A8"
    with pytest.raises(ValueError, match="there is no model 'none'"):
        shelf.find("none")
    (tmp_path / "small.safetensors").unlink()
    shelf.refresh()
    assert "small" not in shelf.entries


def test_a_second_file_of_a_name_is_left_out_with_a_warning(tmp_path, small_model, caplog):
    _, ckpt = small_model
    for path in (tmp_path / "embedded.safetensors", tmp_path / "other" / "embedded.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ckpt, path)
    embedded = ModelOptions(config=EMBEDDED)
    shelf = Shelf(ModelChoice(model=embedded, device="cpu", model_dir=tmp_path, lora_dir=tmp_path))
    assert shelf.find("embedded").spec.ckpt != tmp_path / "embedded.safetensors"
    assert shelf.lora("embedded", 1.0).path == tmp_path / "embedded.safetensors"
    lines = [record.getMessage() for record in caplog.records]
    assert any("has its title, too" in line for line in lines) and any("has its name, too" in line for line in lines)


@pytest.mark.slow
def test_a_model_that_cannot_be_read_leaves_the_studio_at_work(studio, monkeypatch):
    first = studio.switch("embedded").future.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(LatentColors, "of", lambda pipeline: 1 / 0)
        assert isinstance(studio.switch("embedded W8A8").future.exception(60), ZeroDivisionError)
    assert studio.title == "embedded"
    again = studio.switch("embedded").future.result(60)  # it was given up for the other one
    assert again is not first and studio.colors is not None
    assert studio.switch("embedded").future.result(60) is again
