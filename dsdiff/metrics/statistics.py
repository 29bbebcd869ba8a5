"""Mean and covariance of features: the Gaussian that a Frechet distance compares, and the files that keep it."""

import functools
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm.fileio import write_atomically


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """Mean and covariance of the features of a set of pictures.

    mu: float64 [d]. sigma: float64 [d, d], unbiased. n: number of pictures, None where a file does not say. facts: of
    the pictures and the extractor, as plain values; empty where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """Return the symmetric square root of sigma."""
        values, vectors = np.linalg.eigh((self.sigma + self.sigma.T) / 2)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T


def write_statistics(path: Path, gaussian: Gaussian) -> None:
    """Write mu and sigma, under the names that other FID programs use, n, and the facts as JSON.

    path: ends in .npz or .safetensors, which decides the format. Its folder is made.
    """
    facts = json.dumps(dict(gaussian.facts))
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            arrays = {"mu": gaussian.mu, "sigma": gaussian.sigma}
            save_file(arrays, temporary, metadata={"n": str(gaussian.n), "facts": facts})
            return
        with open(temporary, "wb") as file:
            np.savez(file, mu=gaussian.mu, sigma=gaussian.sigma, n=np.array(gaussian.n), facts=np.array(facts))

    write_atomically(path, write)


def read_statistics(path: Path) -> Gaussian:
    """Return the content of a statistics file of ours, or of another program's that has mu and sigma.

    Raises ValueError if it is missing or no such file.
    """
    if not path.is_file():
        raise ValueError(f"no reference at {str(path)!r}: write such a file with --save_stats")
    try:
        gaussian = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    except (SafetensorError, zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no statistics file with mu and sigma: {error}") from error
    if not isinstance(gaussian.facts, dict):
        raise ValueError(f"{str(path)!r}: its facts are no dictionary")
    d = gaussian.mu.shape[0] if gaussian.mu.ndim == 1 else 0
    if not d or gaussian.sigma.shape != (d, d) or not np.isfinite([*gaussian.mu, gaussian.sigma.sum()]).all():
        raise ValueError(f"{str(path)!r}: mu {gaussian.mu.shape} and sigma {gaussian.sigma.shape} are no statistics")
    return gaussian


def _read_safetensors(path: Path) -> Gaussian:
    with safe_open(path, "np") as file:
        texts = file.metadata() or {}
        mu, sigma = (file.get_tensor(name).astype(np.float64) for name in ("mu", "sigma"))
    n = texts.get("n", "None")
    return Gaussian(mu=mu, sigma=sigma, n=None if n == "None" else int(n), facts=json.loads(texts.get("facts", "{}")))


def _read_npz(path: Path) -> Gaussian:
    with np.load(path, allow_pickle=False) as file:
        mu, sigma = (file[name].astype(np.float64) for name in ("mu", "sigma"))
        n = int(file["n"]) if "n" in file else None
        facts = json.loads(str(file["facts"])) if "facts" in file else {}
    return Gaussian(mu=mu, sigma=sigma, n=n, facts=facts)
