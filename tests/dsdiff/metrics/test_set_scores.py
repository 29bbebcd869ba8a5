"""Scores of sets from features, against formulas in float64, numbers worked by hand, and statistics."""

import numpy as np
import pytest
import torch

from dsdiff.metrics import intervals
from dsdiff.metrics import set_scores as scores
from dsdiff.metrics.extractors import Features
from dsdiff.metrics.scores import Scores
from dsdiff.metrics.statistics import Gaussian


def vectors_of(n, d=6, seed=0, shift=0.0):
    """Correlated, not Gaussian, of different variances."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) ** 3 @ rng.uniform(-1, 1, (d, d)) + shift).astype(np.float64)


def gaussian(vectors):
    return scores.gaussian_of(Features(vectors=torch.from_numpy(vectors)))


def frechet(first, second):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with the root of a product of covariances by its eigenvalues."""
    mu1, mu2 = first.mean(0), second.mean(0)
    s1, s2 = ((v - v.mean(0)).T @ (v - v.mean(0)) / (len(v) - 1) for v in (first, second))
    values, basis = np.linalg.eig(s1 @ s2)
    root = (basis * np.sqrt(values.astype(complex))) @ np.linalg.inv(basis)
    assert np.allclose(root @ root, s1 @ s2)
    return np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * root.real)


# --- Frechet distance --------------------------------------------------------------------------------------


def test_fid_is_the_formula():
    first, second = vectors_of(50), vectors_of(70, seed=1, shift=0.3)
    assert scores.fid(gaussian(first), gaussian(second)) == pytest.approx(frechet(first, second), rel=1e-9)


def test_fid_of_one_dimension_by_hand():
    """Means 0 and 3, standard deviations 1 and 2: 9 + (1 - 2)^2."""
    one = Gaussian(mu=np.array([0.0]), sigma=np.array([[1.0]]))
    other = Gaussian(mu=np.array([3.0]), sigma=np.array([[4.0]]))
    assert scores.fid(one, other) == pytest.approx(10)


RANKS = {"full rank": 50, "rank deficient": 5}


def test_fid_of_a_set_with_itself_is_zero():
    for case, n in RANKS.items():
        own = gaussian(vectors_of(n))
        assert abs(scores.fid(own, own)) < 1e-5 * np.trace(own.sigma), case


def test_the_fast_fid_is_the_fid():
    for case, n in RANKS.items():
        vectors, reference = vectors_of(n), gaussian(vectors_of(70, seed=1, shift=0.3))
        expected = scores.fid(gaussian(vectors), reference)
        assert scores.fid_of_vectors(vectors, reference) == pytest.approx(expected, rel=1e-6), case


def test_a_line_in_1_over_n_is_extrapolated_exactly():
    curve = [(n, 2.5 + 40 / n) for n in (10, 20, 40, 100)]
    assert scores.extrapolate(curve) == pytest.approx(2.5)


def test_curve_has_growing_counts_and_ends_with_the_fid_of_all():
    vectors, reference = vectors_of(60), gaussian(vectors_of(70, seed=1))
    curve = scores.fid_curve(vectors, reference, seed=0)
    counts = [count for count, _ in curve]
    assert counts == sorted(counts) and len(counts) == 8 and (counts[0], counts[-1]) == (12, 60)
    assert curve[-1][1] == pytest.approx(scores.fid(gaussian(vectors), reference))
    assert curve == scores.fid_curve(vectors, reference, seed=0) != scores.fid_curve(vectors, reference, seed=1)


def test_extrapolation_takes_the_bias_of_few_pictures_away():
    """Pictures from the reference's own distribution: the true distance is 0."""
    reference = Gaussian(mu=np.zeros(8), sigma=np.eye(8))
    drawn = np.random.default_rng(0).standard_normal((20, 160, 8))
    biased = np.mean([scores.fid_of_vectors(vectors, reference) for vectors in drawn])
    extrapolated = np.mean([scores.extrapolate(scores.fid_curve(vectors, reference, 0)) for vectors in drawn])
    assert biased > 0.1 and abs(extrapolated) < biased / 5


# --- uncertainty -------------------------------------------------------------------------------------------


def test_the_interval_of_the_fid_is_as_wide_as_the_fid_scatters():
    reference = Gaussian(mu=np.zeros(8), sigma=np.eye(8))
    drawn = np.random.default_rng(0).standard_normal((60, 100, 8)) * 1.3
    scatter = np.std([scores.fid_of_vectors(vectors, reference) for vectors in drawn])
    errors = [intervals.jackknife_error(scores.fid_replicates(vectors, reference, 0)) for vectors in drawn[:20]]
    assert 0.7 < np.mean(errors) / scatter < 1.5


def test_the_difference_of_pairs_is_surer_than_the_scores():
    reference = gaussian(vectors_of(200, seed=1))
    first = vectors_of(100)
    both = [Features(vectors=torch.from_numpy(vectors)) for vectors in (first, first + 0.05)]
    found = Scores()
    scores.add_fid_difference(found, *both, reference)
    difference = found.by_key["fid_difference"]
    scores.add_fid(found, both[0], reference, 0)
    fids = [scores.fid(scores.gaussian_of(features), reference) for features in both]
    assert difference.value == pytest.approx(fids[0] - fids[1])
    assert difference.low < difference.value < difference.high
    assert difference.high - difference.low < (found.by_key["fid"].high - found.by_key["fid"].low) / 2


# --- what the numbers of pictures allow --------------------------------------------------------------------


def scored(n, m, logits=None):
    found = Scores()
    first = Features(vectors=torch.from_numpy(vectors_of(n)).float(), logits=logits)
    scores.add_set_scores(found, first, Features(vectors=torch.from_numpy(vectors_of(m, seed=1)).float()))
    return found


ALL = {"fid", "fid_infinity", "kid", "precision", "recall"}
FEW = [
    (60, 60, ALL, ["biased by", "unbiased but noisy", "too high"]),
    (23, 60, ALL - {"fid_infinity"}, ["FID infinity: left out", "same numbers"]),
    (6, 60, ALL - {"fid_infinity"}, ["6 pictures for 6 dimensions", "rank deficient"]),
    (60, 5, ALL, ["5 in the reference for 6 dimensions"]),
    (3, 60, {"fid"}, ["KID: left out", "precision, recall: left out", "without interval"]),
]


def test_what_few_pictures_do_is_told():
    for n, m, present, told in FEW:
        found = scored(n, m)
        assert set(found.by_key) == present, (n, m)
        for words in [*told, "Inception Score: left out"]:
            assert sum(words in note for note in found.notes) == 1, (n, m, words)
        assert (found.by_key["fid"].low is None) == (n < 20), (n, m)


def test_enough_pictures_are_no_reason_for_notes_on_rank():
    assert not any("rank deficient" in note for note in scored(7, 7).notes)


def test_one_picture_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        scored(1, 60)


def test_inception_score_by_hand():
    """Ten splits of two sure pictures of two classes: exp of the entropy ln 2."""
    logits = torch.zeros(20, 4)
    order = np.random.RandomState(2020).permutation(20)  # torch-fidelity's
    logits[order[::2], 0] = logits[order[1::2], 1] = 100
    found = scored(20, 20, logits=logits)
    assert found.by_key["inception_score"].value == pytest.approx(2) and found.by_key["inception_score"].spread < 1e-6
    assert any("all 4 classes" in note for note in found.notes)
