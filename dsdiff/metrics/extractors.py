"""What networks make of pictures: feature extractors, registered with torch-fidelity, and the files that keep results.

Features  a vector a picture, in a cache under a name that carries the hashes of pictures and weights
Gaussian  mean and covariance of the vectors, in a statistics file (.npz or .safetensors) that others can use too
"""

import functools
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from dsdiff.cli.console import logger
from dsdiff.images.folders import PictureSet
from dsdiff.pipeline import ROOT, precision_context
from ldm.data.reader import ShapesReader
from ldm.fileio import file_sha256, write_atomically

READER = ROOT / "models/ldm/shapes/reader.safetensors"
EXTRACTORS = ("inception", "shapes")
STATISTICS = (".npz", ".safetensors")


# --- extractors --------------------------------------------------------------------------------------------


class ShapesFeatures(FeatureExtractorBase):
    """The trunk of the reader of shapes, averaged over the picture: 128 features. It has no class logits.

    feature_extractor_weights_path: of the reader, by default the one that comes with the embedded model.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **options: Any
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path or READER)
        self.reader = ShapesReader.from_file(path)
        self.weights_sha256 = file_sha256(path)

    def get_name(self) -> str:
        """Part of the name under which torch-fidelity caches features: it must change with the weights."""
        return f"{self.name}-{self.weights_sha256[:16]}"

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("128",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        if metric not in ("fid", "kid", "prc"):
            raise ValueError(f"the shapes features have no class logits, which {metric!r} needs")
        return "128"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, H, W], sides multiples of 8 -> ([B, 128],)"""
        return (self.reader.features(images.float() / 127.5 - 1),)


if "shapes" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("shapes", ShapesFeatures)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network of torch-fidelity's registry and the layers that are taken.

    name: ours. registered: torch-fidelity's. features, logits: names of layers; logits is None where there are none.
    dimensions: of a feature vector. weights: a file. genuine: these are the weights that everybody uses.
    """

    name: str
    registered: str
    features: str
    logits: str | None
    dimensions: int
    weights: Path
    genuine: bool = True

    @property
    def label(self) -> str:
        """What stands behind a score's name, so that nobody takes it for Inception's."""
        if self.name == "inception":
            return "" if self.genuine else " (other weights than torch-fidelity's)"
        return f" ({self.name} features)"

    @functools.cached_property
    def weights_sha256(self) -> str:
        return file_sha256(self.weights)

    def build(self, device: torch.device) -> FeatureExtractorBase:
        """The network, on `device`."""
        layers = [self.features] + ([self.logits] if self.logits else [])
        path = str(self.weights)
        try:
            network = create_feature_extractor(
                self.registered, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
            )
        except RuntimeError as error:  # of load_state_dict
            raise ValueError(f"{path!r} does not hold the weights of {self.registered}") from error
        return network.to(device)

    def facts(self) -> dict[str, Any]:
        """What to store about it."""
        layers = {"features": self.features, "logits": self.logits, "dimensions": self.dimensions}
        return {"extractor": self.name, "network": self.registered, **layers, "weights_sha256": self.weights_sha256}


def choose_extractor(name: str, *, reader: Path | None = None, inception_weights: Path | None = None) -> Extractor:
    """The extractor `name` of EXTRACTORS. ValueError or OSError if its weights cannot be had."""
    if name == "shapes":
        weights = reader or READER
        if not weights.is_file():
            raise ValueError(f"no weights of the reader of shapes at {str(weights)!r}: give their path with --reader")
        return Extractor(name=name, registered=name, features="128", logits=None, dimensions=128, weights=weights)
    weights = inception_weights or fetch_inception()
    return Extractor(
        name=name,
        registered="inception-v3-compat",
        features="2048",
        logits="logits_unbiased",
        dimensions=2048,
        weights=weights,
        genuine=check_inception(weights),
    )


def fetch_inception() -> Path:
    """Where torch-fidelity keeps its Inception weights, fetched if they are not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", URL_INCEPTION_V3)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), _inception_prefix())
    except (OSError, RuntimeError) as error:  # no network; a file that is not what it should be
        raise ValueError(
            f"no Inception weights at {str(path)!r}, and they cannot be fetched ({error}): give {path.name} with "
            "--inception_weights FILE, or take --features shapes"
        ) from error
    return path


def check_inception(path: Path) -> bool:
    """Whether `path` holds torch-fidelity's weights. ValueError if it is no file of tensors (a pickle can be code)."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} holds no weights in PyTorch's format: {reason}") from error
    genuine = file_sha256(path).startswith(_inception_prefix())
    if not genuine:
        logger.warning("%s is not torch-fidelity's Inception: scores compare with nobody else's", path)
    return genuine


def _inception_prefix() -> str:
    """How the SHA-256 of the weights begins: their name ends in it."""
    return Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1]


# --- features ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Features:
    """vectors: float32 [N, dimensions]. logits: float32 [N, classes], None where the extractor has none."""

    vectors: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def chosen(self, indices: Sequence[int]) -> "Features":
        """Those of the pictures `indices`, in their order."""
        return Features(**{name: value[list(indices)] for name, value in vars(self).items() if value is not None})


class FeatureStore:
    """Makes the features of sets of pictures, and keeps them in the folder `cache` if there is one."""

    def __init__(self, extractor: Extractor, device: torch.device, batch_size: int, cache: Path | None) -> None:
        self.extractor, self.device, self.batch_size, self.cache = extractor, device, batch_size, cache

    @functools.cached_property
    def network(self) -> FeatureExtractorBase:
        return self.extractor.build(self.device)

    def path(self, pictures: PictureSet) -> Path | None:
        """NAME-WEIGHTS-PICTURES.safetensors, with the first 16 digits of both hashes."""
        if self.cache is None:
            return None
        hashes = f"{self.extractor.weights_sha256[:16]}-{pictures.content[:16]}"
        return self.cache / f"{self.extractor.name}-{hashes}.safetensors"

    def __call__(self, pictures: PictureSet) -> Features:
        path = self.path(pictures)
        header = {**self.extractor.facts(), **pictures.facts()}
        kept = None if path is None else self._read(path, header)
        if kept is not None:
            logger.debug("features from %s", path)
            return kept
        features = self.extract(pictures)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor for name, tensor in vars(features).items() if tensor is not None}
            text = {"features": json.dumps(header)}
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=text))
        return features

    @torch.inference_mode()
    def extract(self, pictures: PictureSet) -> Features:
        """Float32 throughout, not rounded to TF32 on the way."""
        parts: dict[str, list[Tensor]] = {}
        bar = tqdm(total=len(pictures), desc=f"{self.extractor.name} features", unit="picture")
        with bar, precision_context(self.device, "full"):
            for start in range(0, len(pictures), self.batch_size):
                indices = range(start, min(start + self.batch_size, len(pictures)))
                batch = torch.stack([pictures[i] for i in indices]).to(self.device)
                values = self.network.convert_features_tuple_to_dict(self.network(batch))
                for layer, value in values.items():
                    parts.setdefault(layer, []).append(value.float().cpu())
                bar.update(len(batch))
        layers = {layer: torch.cat(values).contiguous() for layer, values in parts.items()}
        return Features(vectors=layers[self.extractor.features], logits=layers.get(self.extractor.logits))

    @staticmethod
    def _read(path: Path, header: Mapping[str, Any]) -> Features | None:
        """What `path` keeps; None if it is not there, damaged, or of other pictures or weights."""
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("features", "{}")
            kept, same = json.loads(text), ("network", "features", "logits", "n", "weights_sha256", "content_sha256")
            if any(kept.get(name) != header[name] for name in same):
                return None
            return Features(**load_file(path))
        except (OSError, SafetensorError, ValueError, TypeError):
            return None


# --- statistics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """mu: float64 [d]. sigma: float64 [d, d], unbiased. n: pictures behind them, None where a file does not say.

    facts: what is known of the pictures and the extractor, empty where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of sigma."""
        values, vectors = np.linalg.eigh((self.sigma + self.sigma.T) / 2)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T


def is_statistics(source: str) -> bool:
    """Whether a source is named like a statistics file."""
    return Path(source).suffix in STATISTICS and not Path(source).is_dir()


def write_statistics(path: Path, gaussian: Gaussian) -> None:
    """mu and sigma, under the names that other FID programs use, n, and all facts as JSON."""
    arrays = {"mu": gaussian.mu, "sigma": gaussian.sigma}
    facts = json.dumps(dict(gaussian.facts))
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            save_arrays(arrays, temporary, metadata={"n": str(gaussian.n), "facts": facts})
            return
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, n=np.array(gaussian.n), facts=np.array(facts))

    write_atomically(path, write)


def read_statistics(path: Path) -> Gaussian:
    """A statistics file of ours, or another program's with mu and sigma. ValueError if it is none."""
    if not path.is_file():
        raise ValueError(f"no reference at {str(path)!r}: write such a file with --save_stats")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
        gaussian = Gaussian(**content)
    except (SafetensorError, zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no statistics file with mu and sigma: {error}") from error
    if not isinstance(gaussian.facts, dict):
        raise ValueError(f"{str(path)!r}: its facts are no dictionary")
    d = gaussian.mu.shape[0] if gaussian.mu.ndim == 1 else 0
    if not d or gaussian.sigma.shape != (d, d) or not np.isfinite([*gaussian.mu, gaussian.sigma.sum()]).all():
        raise ValueError(f"{str(path)!r}: mu {gaussian.mu.shape} and sigma {gaussian.sigma.shape} are no statistics")
    return gaussian


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "np") as file:
        texts = file.metadata() or {}
        arrays = {name: file.get_tensor(name).astype(np.float64) for name in ("mu", "sigma")}
    n = texts.get("n", "None")
    return {**arrays, "n": None if n == "None" else int(n), "facts": json.loads(texts.get("facts", "{}"))}


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name].astype(np.float64) for name in ("mu", "sigma")}
        n = int(file["n"]) if "n" in file else None
        return {**arrays, "n": n, "facts": json.loads(str(file["facts"])) if "facts" in file else {}}
