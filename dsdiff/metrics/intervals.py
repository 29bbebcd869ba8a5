"""Confidence intervals: jackknife, bootstrap, and the interval of a share."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

GROUPS = 10  # parts of the pictures that the jackknife leaves out in turn
T_QUANTILE = 2.262  # 97.5% of Student's t with GROUPS - 1 degrees of freedom


def mean_and_error(values: Any) -> tuple[float, float]:
    """Return the mean of two values or more, and its standard error. values: an array or a tensor [n]."""
    numbers = np.asarray(values, dtype=np.float64)
    return float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers)))


# --- jackknife ---------------------------------------------------------------------------------------------


def without_groups(n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ten masks, bool [n]: each is False for another random tenth of the pictures."""
    for group in np.array_split(np.random.default_rng(seed).permutation(n), GROUPS):
        kept = np.ones(n, dtype=bool)
        kept[group] = False
        yield kept


def jackknife_error(replicates: Sequence[float]) -> float:
    """Return the standard error of an estimate, from its values without each of the groups."""
    values = np.array(replicates)
    return float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))


def jackknife_interval(value: float, replicates: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the 95% interval of the delete-a-group jackknife; (None, None) without replicates.

    A bootstrap would not do for a distance of sets: a picture that is drawn twice makes the set look smaller, and the
    distance larger.
    """
    if not replicates:
        return None, None
    half = jackknife_error(replicates) * T_QUANTILE
    return value - half, value + half


# --- bootstrap ---------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: np.ndarray, clusters: Sequence[str], resamples: int, seed: int
) -> tuple[float, float] | None:
    """Return the 95% percentile interval of the mean of `values`; None if there are fewer than 2.

    Whole clusters are drawn again, since the pictures of one prompt are alike. If all values are of one cluster, the
    values themselves are drawn.
    """
    if len(values) < 2:
        return None
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    if member.max() == 0:
        member = np.arange(len(values))
    sums, sizes = np.bincount(member, weights=values), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# --- shares ------------------------------------------------------------------------------------------------


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share right / n, in [0, 1] (Wilson 1927)."""
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
