"""Ratios by step and by level, as texts."""

import pytest

from tomesd.options import MergeOptions
from tomesd.schedule import Schedule, parse_limits


def test_a_ratio_holds_until_the_next_place_with_any_number_of_steps():
    schedule = Schedule.parse("0:0.7,0.55:0.5,0.9:0")
    for steps in (1, 3, 7, 20, 50, 1000):
        for step in range(steps):
            # Whole numbers: a place of 55 % is reached where 100 step >= 55 steps.
            expected = 0 if 100 * step >= 90 * steps else 0.5 if 100 * step >= 55 * steps else 0.7
            assert schedule.at(step, steps) == expected, (step, steps)


def test_linear_goes_from_the_first_step_to_the_last():
    schedule = Schedule.parse("linear:0.7:0.3")
    assert [round(schedule.at(step, 5), 12) for step in range(5)] == [0.7, 0.6, 0.5, 0.4, 0.3]
    assert schedule.at(0, 1) == 0.7
    assert schedule.starts_at_once and schedule.ratios == (0.7, 0.3)


def test_before_the_first_place_the_ratio_holds():
    options = MergeOptions(ratio=0.5, merge_schedule="0.5:0.25")
    assert [options.ratio_at(1, step, 4) for step in range(4)] == [0.5, 0.5, 0.25, 0.25]
    assert not options.is_scheduled_throughout
    assert MergeOptions(merge_schedule="0:0.1").is_scheduled_throughout


def test_levels_limit_the_ratio_and_levels_not_named_merge_nothing():
    options = MergeOptions(merge_schedule="linear:0.75:0.25", merge_levels="1:0.6,4:0.3")
    found = {level: [options.ratio_at(level, step, 3) for step in range(3)] for level in (1, 2, 4, 8)}
    assert found == {1: [0.6, 0.5, 0.25], 2: [0.0] * 3, 4: [0.3, 0.3, 0.25], 8: [0.0] * 3}
    assert options.coarsest == 4
    plain = MergeOptions(ratio=0.4, max_downsample=2)
    assert [plain.ratio_at(level) for level in (1, 2, 4, 8)] == [0.4, 0.4, 0, 0] and plain.coarsest == 2


def test_which_options_need_the_step_and_which_the_other_blocks():
    for options, steps, others in (
        ({}, False, False),
        ({"merge_schedule": "0:0.5"}, True, True),
        ({"merge_every": 2}, True, True),
        ({"merge_share": True}, False, True),
        ({"merge_kv": True, "proportional": True, "merge_levels": "1:0.5"}, False, False),
    ):
        made = MergeOptions(**options)
        assert (made.follows_steps, made.follows_others) == (steps, others), options


def test_what_is_no_schedule_is_refused():
    bad = ("", "0.5", "0:0.5,0:0.4", "0.5:0.4,0.2:0.3", "1:0.5", "-0.1:0.5", "nan:0.5", "0:0.5,", "half:0.5")
    for text in (*bad, "linear:0.5", "linear:a:b", "linear:1:2:3", None, 3):
        with pytest.raises(ValueError, match=r"merge_schedule is .*: write PLACE:RATIO"):
            Schedule.parse(text)


def test_what_is_no_list_of_levels_is_refused():
    assert parse_limits("1:0.6,8:0") == {1: 0.6, 8: 0.0}
    for text in ("", "0.5", "1.5:0.5", "16:0.5", "1:a", "1:0.5:2", "1:0.5,", None):
        with pytest.raises(ValueError, match=r"merge_levels is .*: write LEVEL:RATIO"):
            parse_limits(text)
