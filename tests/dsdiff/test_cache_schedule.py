"""The file of a schedule of cached steps: what is read back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsdiff.cache_schedule import CacheSchedule
from dsdiff.options import DrawOptions

SCHEDULE = CacheSchedule(
    sampler="ddim", steps=8, guidance=(0.0, 0.5), depth=2, whole=(0, 3, 5), error=0.01, made={"n": 2}
)


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "cache.json"
    for schedule in (SCHEDULE, replace(SCHEDULE, guidance=None, whole=(0,))):
        schedule.write(path)
        assert CacheSchedule.read(path) == schedule
    with pytest.raises(FileNotFoundError):
        CacheSchedule.read(tmp_path / "none.json")


def test_steps_that_cannot_be_are_refused():
    for changes, says in (
        ({"steps": 0}, "steps is 0"),
        ({"depth": True}, "depth is True"),
        ({"whole": ()}, "whole is"),
        ({"whole": (1, 2)}, "whole is"),
        ({"whole": (0, 5, 3)}, "whole is"),
        ({"whole": (0, 8)}, "0..7 in order"),
        ({"whole": (0, 1.5)}, "whole is"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(SCHEDULE, **changes)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "cache.json"
    SCHEDULE.write(path)
    content = json.loads(path.read_text())
    for text in (
        "",
        "[]",
        "[" * 100_000,
        json.dumps({**content, "format": "another"}),
        json.dumps({**content, "whole": "all"}),
        json.dumps({**content, "guidance": [1]}),
        json.dumps({name: value for name, value in content.items() if name != "depth"}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"no file of scripts/schedule_cache\.py"):
            CacheSchedule.read(path)


def test_options_take_a_file_or_a_number():
    assert DrawOptions(cache=Path("cache.json")).cache == Path("cache.json")
    with pytest.raises(ValueError, match="cache_depth has no effect with 'cache"):
        DrawOptions(cache=Path("cache.json"), cache_depth=2)
    with pytest.raises(ValueError, match="cache is '2'"):
        DrawOptions(cache="2")
