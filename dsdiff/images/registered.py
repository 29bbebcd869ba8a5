"""Sets of pictures that torch-fidelity knows by name, and our procedural pictures under a name in its registry."""

import hashlib
from pathlib import Path
from urllib.error import URLError

import torch
from PIL import Image
from torch_fidelity.registry import DATASETS_REGISTRY, register_dataset
from tqdm import tqdm

from dsdiff.images.sets import PictureSet, ShapesPictures, text_sha256
from dsdiff.images.sources import SHAPES, Size


class RegisteredPictures(PictureSet):
    """The first pictures of a data set that torch-fidelity knows by name, such as cifar10-val.

    limit: how many (None: all). root: the folder of the data sets (None: torch-fidelity's own). Fetches the data set
    if it is not there. Raises ValueError if it cannot be fetched.
    """

    def __init__(self, name: str, limit: int | None = None, root: Path | None = None) -> None:
        self.name = f"torch-fidelity's {name}"
        root = root or Path(torch.hub.get_dir()).parent / "fidelity_datasets"
        root.mkdir(parents=True, exist_ok=True)
        try:
            self.data = DATASETS_REGISTRY[name](str(root), True)
        except (URLError, RuntimeError) as error:
            raise ValueError(f"data set {name!r} is not under {str(root)!r} and cannot be fetched: {error}") from error
        self.length = min(limit or len(self.data), len(self.data))
        digest = hashlib.sha256()
        sizes: dict[Size, str] = {}
        for i in tqdm(range(self.length), desc="reading", unit="picture", leave=False):
            item = self.data[i].contiguous()
            digest.update(item.numpy().tobytes())
            sizes.setdefault((item.shape[2], item.shape[1]), f"picture {i}")
        self.sizes = sizes
        self.raw_content = text_sha256(digest.hexdigest(), str(sizes))

    def __len__(self) -> int:
        return self.length

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.data[index].permute(1, 2, 0).numpy())


def registered_names() -> list[str]:
    """Return the names of all data sets but our own."""
    return [name for name in DATASETS_REGISTRY if name != SHAPES]


if SHAPES not in DATASETS_REGISTRY:  # for torch_fidelity.calculate_metrics(input2="shapes")
    register_dataset(SHAPES, lambda root, download: ShapesPictures())
