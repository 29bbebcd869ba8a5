"""Intervals against known standard errors and published tables."""

import math

import numpy as np
import pytest

from dsdiff.metrics import intervals


def test_the_jackknife_masks_leave_each_picture_out_once():
    masks = np.array(list(intervals.without_groups(37, seed=3)))
    assert masks.shape == (10, 37) and ((~masks).sum(0) == 1).all()


def test_jackknife_error_of_a_mean_is_the_known_one():
    """With groups of one, the jackknife's error of a mean is s / sqrt(n) exactly."""
    values = np.random.default_rng(0).standard_normal(30)
    replicates = [np.delete(values, i).mean() for i in range(30)]
    assert intervals.jackknife_error(replicates) == pytest.approx(values.std(ddof=1) / math.sqrt(30))


def test_bootstrap_is_deterministic_and_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).standard_normal(400)
    names = [str(i) for i in range(400)]
    low, high = intervals.bootstrap_interval(values, names, 2000, seed=5)
    assert (low, high) == intervals.bootstrap_interval(values, names, 2000, seed=5)
    assert (low, high) != intervals.bootstrap_interval(values, names, 2000, seed=6)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )


def test_bootstrap_draws_prompts_not_pictures():
    """Four equal pictures of each prompt say no more than one."""
    values, names = np.random.default_rng(0).standard_normal(50), [str(i) for i in range(50)]
    once = intervals.bootstrap_interval(values, names, 500, seed=0)
    four = intervals.bootstrap_interval(np.repeat(values, 4), np.repeat(names, 4), 500, seed=0)
    assert np.ptp(four) == pytest.approx(np.ptp(once), rel=0.15)


def test_bootstrap_of_one_prompt_draws_its_pictures():
    low, high = intervals.bootstrap_interval(np.arange(10.0), ["same"] * 10, 500, seed=0)
    assert 2 < low < 3.5 and 5.5 < high < 7


def test_one_value_has_no_interval():
    assert intervals.bootstrap_interval(np.array([1.0]), ["a"], 100, seed=0) is None


def test_wilson_interval():
    for right, n, low, high in ((0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 100, 0.7222, 0.8749)):
        assert intervals.wilson(right, n) == pytest.approx((low, high), abs=1e-4), (right, n)


def test_jackknife_interval_is_the_error_times_the_quantile():
    replicates = [1.0, 2.0, 4.0]
    half = 2.262 * intervals.jackknife_error(replicates)
    assert intervals.jackknife_interval(2.5, replicates) == pytest.approx((2.5 - half, 2.5 + half))
    assert intervals.jackknife_interval(2.5, []) == (None, None)
