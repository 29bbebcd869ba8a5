"""Networks that turn pictures into vectors, and a store that keeps these vectors.

A network is one of torch-fidelity's registry; ours is registered there. The store's files carry the hashes of pictures
and weights in their names.
"""

import functools
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from dsdiff.environment import precision_context
from dsdiff.images.sets import PictureSet
from dsdiff.models.registry import READER
from ldm.data.reader import ShapesReader
from ldm.fileio import file_sha256, write_atomically
from ldm.messages import first_line
from ldm.tensor_files import check_whole, save_tensors

logger = logging.getLogger(__name__)


# --- extractors --------------------------------------------------------------------------------------------


class ShapesFeatures(FeatureExtractorBase):
    """The 128 features of the reader of shapes, averaged over the picture. It has no class logits.

    name, features_list: as torch-fidelity gives them. feature_extractor_weights_path: the reader's weights (None: those
    that come with the embedded model).
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **options: Any
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path or READER)
        self.reader = ShapesReader.from_file(path)
        self.weights_sha256 = file_sha256(path)

    def get_name(self) -> str:
        """Return the name under which torch-fidelity caches features. It changes with the weights."""
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
        """Return ([B, 128],) for uint8 images [B, 3, H, W] whose sides are multiples of 8."""
        return (self.reader.features(images.float() / 127.5 - 1),)


if "shapes" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("shapes", ShapesFeatures)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network of torch-fidelity's registry, and the layers that are taken of it.

    name: one of EXTRACTORS. registered: its name in torch-fidelity's registry. features, logits: names of layers; the
    network without class logits has None. dimensions: length of a feature vector. weights: their file. genuine: whether
    these are the weights that everybody uses.
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
        """Return what is written behind a score's name, so that nobody takes it for one of Inception's features."""
        if self.name == "inception":
            return "" if self.genuine else " (other weights than torch-fidelity's)"
        return f" ({self.name} features)"

    @functools.cached_property
    def weights_sha256(self) -> str:
        return file_sha256(self.weights)

    def build(self, device: torch.device) -> FeatureExtractorBase:
        """Return the network, on `device`. Raises ValueError if the file holds the weights of another one."""
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
        """Return the plain values that are stored with its features."""
        layers = {"features": self.features, "logits": self.logits, "dimensions": self.dimensions}
        return {"extractor": self.name, "network": self.registered, **layers, "weights_sha256": self.weights_sha256}


def choose_extractor(name: str, *, reader: Path | None = None, inception_weights: Path | None = None) -> Extractor:
    """Return the extractor `name` of EXTRACTORS.

    reader, inception_weights: files of weights (None: the usual ones). Raises ValueError or OSError if there are none.
    """
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
    """Return the file in which torch-fidelity keeps its Inception weights. It is fetched if it is not there.

    Raises ValueError if it cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", URL_INCEPTION_V3)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), _inception_prefix())
    except (OSError, RuntimeError) as error:  # without network; with a wrong hash
        raise ValueError(
            f"no Inception weights at {str(path)!r}, and they cannot be fetched ({error}): give {path.name} with "
            "--inception_weights FILE, or take --features shapes"
        ) from error
    return path


def check_inception(path: Path) -> bool:
    """Return whether `path` holds torch-fidelity's weights.

    Raises ValueError if it is no file of tensors. Only tensors are read, since any other pickle can be code.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{str(path)!r} holds no weights in PyTorch's format: {reason}") from error
    genuine = file_sha256(path).startswith(_inception_prefix())
    if not genuine:
        logger.warning("%s is not torch-fidelity's Inception: scores compare with nobody else's", path)
    return genuine


def _inception_prefix() -> str:
    """Return the first digits of the SHA-256 of torch-fidelity's weights, with which the file's name ends."""
    return Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1]


# --- features ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N pictures. vectors: float32 [N, dimensions]. logits: float32 [N, classes], None without classes."""

    vectors: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def chosen(self, indices: Sequence[int]) -> "Features":
        """Return the features of the pictures `indices`, in that order."""
        rows = list(indices)
        return Features(vectors=self.vectors[rows], logits=None if self.logits is None else self.logits[rows])


class FeatureStore:
    """Computes the features of sets of pictures, and keeps them in the folder `cache` if there is one."""

    def __init__(self, extractor: Extractor, device: torch.device, batch_size: int, cache: Path | None) -> None:
        self.extractor, self.device, self.batch_size, self.cache = extractor, device, batch_size, cache

    @functools.cached_property
    def network(self) -> FeatureExtractorBase:
        return self.extractor.build(self.device)

    def path(self, pictures: PictureSet) -> Path | None:
        """Return the file for a set: NAME-WEIGHTS-PICTURES.safetensors, with the first 16 digits of both hashes."""
        if self.cache is None:
            return None
        hashes = f"{self.extractor.weights_sha256[:16]}-{pictures.content[:16]}"
        return self.cache / f"{self.extractor.name}-{hashes}.safetensors"

    def __call__(self, pictures: PictureSet) -> Features:
        """Return the features of a set, from its file if that is there and undamaged."""
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
            write_atomically(path, lambda temporary: save_tensors(tensors, temporary, text))
        return features

    @torch.inference_mode()
    def extract(self, pictures: PictureSet) -> Features:
        """Return the features of a set from the network, computed in float32 without TF32."""
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
        logits = None if self.extractor.logits is None else layers[self.extractor.logits]
        return Features(vectors=layers[self.extractor.features], logits=logits)

    @staticmethod
    def _read(path: Path, header: Mapping[str, Any]) -> Features | None:
        """Return the features in `path`; None if it is missing, damaged, or of other pictures or weights."""
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("features", "{}")
            kept, same = json.loads(text), ("network", "features", "logits", "n", "weights_sha256", "content_sha256")
            if any(kept.get(name) != header[name] for name in same):
                return None
            check_whole(path)
            return Features(**load_file(path))
        except (OSError, SafetensorError, ValueError, TypeError):
            return None
