"""Scores of a set of pictures from its features, with their intervals.

FID, KID, Inception Score, precision and recall are torch-fidelity's. Added here are intervals, the FID at several
numbers of pictures and its extrapolation, and notes on what too few pictures do to a score.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from dsdiff.metrics.extractors import Features
from dsdiff.metrics.intervals import GROUPS, jackknife_interval, without_groups
from dsdiff.metrics.scores import Score, Scores
from dsdiff.metrics.statistics import Gaussian

RNG_SEED = 2020  # torch-fidelity's, for the subsets of KID and the splits of the Inception Score
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
FEW_FOR_NEIGHBOURS = 1000
COUNTS = 8  # numbers of pictures at which the FID is taken for its extrapolation
LOWEST_SHARE, LOWEST_RATIO = 5, 2  # the lowest of them: a fifth of the pictures, and 2 pictures a dimension
EXTRAPOLATION_RATIO = 4  # pictures a dimension that the extrapolation needs: below, the FID is no line in 1/N


# --- against a reference -----------------------------------------------------------------------------------


def add_set_scores(scores: Scores, pictures: Features, reference: Features | Gaussian, seed: int = 0) -> None:
    """Add all scores of `pictures` that their number and the reference allow; notes tell what is left out and why.

    seed: of the random parts of the pictures from which intervals and the extrapolation come. Raises ValueError for
    fewer than 2 pictures, and for a reference of other features.
    """
    gaussian = gaussian_of(reference)
    if pictures.vectors.shape[1] != len(gaussian.mu):
        raise ValueError(f"{pictures.vectors.shape[1]} features and a reference of {len(gaussian.mu)}: not the same")
    add_fid(scores, pictures, gaussian, seed)
    if isinstance(reference, Features):
        add_kid(scores, pictures, reference)
        add_precision_recall(scores, pictures, reference)
    else:
        scores.notes.append("KID, precision and recall: left out, since the statistics hold no single pictures")
    add_inception_score(scores, pictures)


def add_fid(scores: Scores, pictures: Features, reference: Gaussian, seed: int) -> None:
    """Add the FID with its interval, and its extrapolation if there are enough pictures."""
    vectors = pictures.vectors.double().numpy()
    n, d = vectors.shape
    if n < 2 * GROUPS:
        scores.notes.append(f"FID: without interval, which needs {2 * GROUPS} pictures, and there are {n}")
    replicates = fid_replicates(vectors, reference, seed)
    scores.by_key["fid"] = interval_score("FID", fid(gaussian_of(pictures), reference), n, replicates)
    sets = {"pictures": n, "in the reference": reference.n}
    few = [f"{count} {what}" for what, count in sets.items() if count is not None and count <= d]
    if few:
        scores.notes.append(
            f"FID: {' and '.join(few)} for {d} dimensions: a covariance is rank deficient, the FID strongly biased "
            "upwards; it compares only with that of equally many pictures"
        )
    add_fid_infinity(scores, vectors, reference, seed)


def add_fid_infinity(scores: Scores, vectors: np.ndarray, reference: Gaussian, seed: int) -> None:
    """Add the FID extrapolated to infinitely many pictures, or a note why it is left out."""
    n, d = vectors.shape
    if n < EXTRAPOLATION_RATIO * d:
        scores.notes.append(
            f"FID infinity: left out, it needs {EXTRAPOLATION_RATIO * d} pictures, "
            f"{EXTRAPOLATION_RATIO} a dimension, and there are {n}"
        )
        return
    scores.curve = fid_curve(vectors, reference, seed)
    masks = tqdm(without_groups(n, seed), total=GROUPS, desc="FID: extrapolation", leave=False)
    replicates = tuple(extrapolate(fid_curve(vectors, reference, seed, kept)) for kept in masks)
    scores.by_key["fid_infinity"] = interval_score("FID infinity", extrapolate(scores.curve), n, replicates)
    bias = scores.by_key["fid"].value - scores.by_key["fid_infinity"].value
    known = "the reference's own number" if reference.n is None else f"the reference's {reference.n}"
    scores.notes.append(
        f"FID: biased by about {bias:.3g} with {n} pictures; FID infinity, extrapolated in 1/N (Chong & Forsyth 2020), "
        f"is without that. The bias from {known} stays in both"
    )


def add_fid_difference(
    scores: Scores, first: Features, second: Features, reference: Features | Gaussian, seed: int = 0
) -> None:
    """Add the FID of `first` minus that of `second`, whose pictures are pairs in their order.

    Pairs are left out together. What a pair has in common moves both FIDs alike, so that the interval of the difference
    is narrower than those of the FIDs.
    """
    gaussian = gaussian_of(reference)
    both = [features.vectors.double().numpy() for features in (first, second)]
    one, other = (fid_of_vectors(vectors, gaussian) for vectors in both)
    pairs = zip(*(fid_replicates(vectors, gaussian, seed) for vectors in both), strict=True)
    replicates = tuple(a - b for a, b in pairs)
    scores.by_key["fid_difference"] = interval_score(
        "FID less that of the other folder", one - other, len(first), replicates
    )


def add_kid(scores: Scores, pictures: Features, reference: Features) -> None:
    """Add the KID with its spread over subsets, or a note why it is left out."""
    fewest = min(len(pictures), len(reference))
    size = KID_SUBSET_SIZE if fewest >= KID_SUBSET_SIZE else fewest // 2
    if size < 2:
        scores.notes.append(f"KID: left out, it needs 4 pictures and there are {fewest}")
        return
    if size < KID_SUBSET_SIZE:
        scores.notes.append(
            f"KID: subsets of {size} instead of {KID_SUBSET_SIZE}, for there are {fewest} pictures: unbiased but noisy"
        )
    both = (features.vectors.double() for features in (pictures, reference))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": RNG_SEED, "verbose": False}
    found = kid_features_to_metric(*both, **options)
    scores.by_key["kid"] = Score(
        name="KID", value=found[KEY_METRIC_KID_MEAN], n=len(pictures), better="lower", spread=found[KEY_METRIC_KID_STD]
    )


def add_precision_recall(scores: Scores, pictures: Features, reference: Features) -> None:
    """Add precision and recall, or a note why they are left out."""
    fewest = min(len(pictures), len(reference))
    if fewest <= NEIGHBOURS:
        scores.notes.append(f"precision, recall: left out, they need {NEIGHBOURS + 1} pictures and there are {fewest}")
        return
    if fewest < FEW_FOR_NEIGHBOURS:
        scores.notes.append(
            f"precision, recall: the neighbourhoods of {fewest} pictures are wide, so that both come out too high"
        )
    if len(pictures) != len(reference):
        scores.notes.append(
            f"precision, recall: of {len(pictures)} pictures and {len(reference)} in the reference; "
            "they compare only with those of the same numbers"
        )
    both = (features.vectors.double() for features in (pictures, reference))
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(*both, **options)
    for key, metric in (("precision", KEY_METRIC_PRECISION), ("recall", KEY_METRIC_RECALL)):
        scores.by_key[key] = Score(name=key, value=found[metric], n=len(pictures), better="higher")


def add_inception_score(scores: Scores, pictures: Features) -> None:
    """Add the Inception Score with its spread over splits, or a note why it is left out."""
    if pictures.logits is None:
        scores.notes.append("Inception Score: left out, since these features come without class logits")
        return
    n, classes = pictures.logits.shape
    if n < IS_SPLITS:
        scores.notes.append(f"Inception Score: left out, it needs {IS_SPLITS} pictures and there are {n}")
        return
    if n < IS_SPLITS * classes:
        scores.notes.append(
            f"Inception Score: a split of {n // IS_SPLITS} pictures cannot show all {classes} classes: it is too low"
        )
    found = isc_features_to_metric(pictures.logits, IS_SPLITS, True, RNG_SEED)
    scores.by_key["inception_score"] = Score(
        name="Inception Score",
        value=found[KEY_METRIC_ISC_MEAN],
        n=n,
        better="higher",
        spread=found[KEY_METRIC_ISC_STD],
    )


# --- Frechet distance --------------------------------------------------------------------------------------


def gaussian_of(features: Features | Gaussian) -> Gaussian:
    """Return mean and covariance of features; a Gaussian is returned as it is.

    Raises ValueError for fewer than 2 pictures.
    """
    if isinstance(features, Gaussian):
        return features
    if len(features) < 2:
        raise ValueError(f"{len(features)} picture: a distance of sets needs at least 2")
    found = fid_features_to_statistics(features.vectors.double())
    return Gaussian(mu=found["mu"], sigma=found["sigma"], n=len(features))


def fid(first: Gaussian, second: Gaussian) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as torch-fidelity computes it."""
    both = ({"mu": gaussian.mu, "sigma": gaussian.sigma} for gaussian in (first, second))
    return fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID]


def fid_of_vectors(vectors: np.ndarray, reference: Gaussian) -> float:
    """Return the FID of vectors, float64 [N, d]. Several times faster than `fid` where many share one reference.

    The eigenvalues of S1 S2 are those of R S1 R, which is symmetric, where R is the root of the reference's S2.
    """
    mu = vectors.mean(0)
    rooted = (vectors - mu) @ reference.root / np.sqrt(len(vectors) - 1)
    values = torch.linalg.eigvalsh(torch.from_numpy(rooted.T @ rooted)).clamp(min=0)
    variance = vectors.var(0, ddof=1).sum()
    distance = np.square(mu - reference.mu).sum()
    return float(distance + variance + np.trace(reference.sigma) - 2 * values.sqrt().sum())


def fid_curve(
    vectors: np.ndarray, reference: Gaussian, seed: int, kept: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """Return (number of pictures, FID) for growing numbers; the last is that of all pictures.

    Each FID is the mean over as many separate random parts of that size as the pictures give. kept: bool [N], False for
    pictures to leave out; the others stay in the same parts as far as that is possible.
    """
    kept = np.ones(len(vectors), dtype=bool) if kept is None else kept
    n, d = kept.sum(), vectors.shape[1]
    rng = np.random.default_rng(seed)
    curve = []
    for count in np.linspace(max(n // LOWEST_SHARE, LOWEST_RATIO * d), n, COUNTS).round().astype(int).tolist():
        order = rng.permutation(len(vectors))
        order = order[kept[order]]
        parts = [order[start : start + count] for start in range(0, n - count + 1, count)]
        curve.append((count, float(np.mean([fid_of_vectors(vectors[part], reference) for part in parts]))))
    return curve


def extrapolate(curve: Sequence[tuple[int, float]]) -> float:
    """Return where a line through FID against 1/N meets 1/N = 0 (Chong & Forsyth 2020, section 4)."""
    counts, values = np.array(curve).T
    return float(np.polyfit(1 / counts, values, 1)[1])


def fid_replicates(vectors: np.ndarray, reference: Gaussian, seed: int) -> tuple[float, ...]:
    """Return the FIDs without each tenth of the pictures; () if there are too few."""
    if len(vectors) < 2 * GROUPS:
        return ()
    masks = tqdm(without_groups(len(vectors), seed), total=GROUPS, desc="FID: interval", leave=False)
    return tuple(fid_of_vectors(vectors[kept], reference) for kept in masks)


def interval_score(name: str, value: float, n: int, replicates: tuple[float, ...]) -> Score:
    """Return a distance of n pictures, the lower the better, with the jackknife's 95% interval."""
    low, high = jackknife_interval(value, replicates)
    return Score(name=name, value=value, n=n, better="lower", low=low, high=high, replicates=replicates)
