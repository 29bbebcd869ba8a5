"""Sets of pictures to score: the files of a folder, of ImageNet or COCO, and procedural pictures."""

import copy
import hashlib
import io
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dsdiff.images.sources import (
    COCO,
    IMAGENET,
    PER_CLASS,
    SHAPES,
    SHAPES_PICTURES,
    SHAPES_SEED,
    SHAPES_SIDE,
    Framing,
    Size,
    size_text,
)
from ldm.data import shapes
from ldm.data.shapes import ShapesDataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits or less, which RGB can hold
IMAGENET_CLASSES = 1000

logger = logging.getLogger(__name__)


# --- sets --------------------------------------------------------------------------------------------------


class PictureSet(Dataset[Tensor], ABC):
    """A set of pictures in the form that torch-fidelity takes: its items are uint8 [3, height, width], RGB.

    name: a description in words. sizes: each size that occurs before framing -> the name of a picture that has it.
    raw_content: a text that differs between sets of different pictures, before framing.
    """

    name: str
    sizes: Mapping[Size, str]
    raw_content: str
    framing: Framing = Framing()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, before framing. Raises ValueError if it cannot be read."""

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        pixels = np.asarray(self.framing(self.picture(index)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def framed(self, framing: Framing) -> Self:
        """Return the same pictures, all of one size. Raises ValueError if `framing` leaves several sizes."""
        if framing.mode == "none" and len(self.sizes) > 1:
            first, second = [f"{size_text(size)} in {example}" for size, example in self.sizes.items()][:2]
            raise ValueError(
                f"{self.name}: pictures of several sizes ({first}, {second}): use --resize squash or center-crop"
            )
        other = copy.copy(self)
        other.framing = framing
        return other

    @property
    def size(self) -> Size:
        """Return the size that all pictures have after framing."""
        side = self.framing.size
        return next(iter(self.sizes)) if side is None else (side, side)

    @property
    def content(self) -> str:
        """Return the SHA-256 of all that the items depend on."""
        return text_sha256(self.raw_content, str(self.framing), PIL.__version__)

    def facts(self) -> dict[str, str | int | list[int]]:
        """Return the plain values that are stored with scores and features of this set."""
        return {"source": self.name, "n": len(self), "size": list(self.size), "content_sha256": self.content}

    def __str__(self) -> str:
        return f"{self.name}: {len(self)} pictures, {size_text(self.size)}"


class FilePictures(PictureSet):
    """The pictures in the files `paths`, in that order. All files are read once, for their hashes and sizes."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self.paths = list(paths)
        self.hashes: list[str] = []
        sizes: dict[Size, str] = {}
        for path in tqdm(self.paths, desc="reading", unit="file", leave=False):
            content = path.read_bytes()
            self.hashes.append(hashlib.sha256(content).hexdigest())
            with open_picture(path, content) as picture:
                sizes.setdefault(picture.size, path.name)
        self.sizes = sizes
        self.raw_content = text_sha256(*self.hashes)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int]) -> "FilePictures":
        """Return the pictures at `indices` alone, in that order."""
        other = copy.copy(self)
        other.paths = [self.paths[i] for i in indices]
        other.hashes = [self.hashes[i] for i in indices]
        other.raw_content = text_sha256(*other.hashes)
        return other

    def picture(self, index: int) -> Image.Image:
        path = self.paths[index]
        with open_picture(path) as picture:
            try:
                return picture.convert("RGB")
            except Exception as error:  # Pillow raises many kinds for damaged files
                raise _broken(path, error) from error

    def prompt_and_seed(self, index: int) -> tuple[str, str]:
        """Return the prompt and the seed that scripts/txt2img.py wrote into the PNG.

        Raises ValueError if the file holds none.
        """
        path = self.paths[index]
        with open_picture(path) as picture:
            if "prompt" not in picture.info or "seed" not in picture.info:
                raise ValueError(f"{str(path)!r} holds no prompt and seed: pictures to pair must come from txt2img.py")
            return str(picture.info["prompt"]), str(picture.info["seed"])


def open_picture(path: Path, content: bytes | None = None) -> Image.Image:
    """Open a picture and read its header, but not yet its pixels.

    content: the bytes of the file, if they are at hand. Raises ValueError if it is no picture of 8 bits a channel, and
    OSError if the file cannot be read.
    """
    try:
        picture = Image.open(path if content is None else io.BytesIO(content))
    except OSError as error:
        if error.strerror:  # the file is missing or not readable
            raise
        raise _broken(path, error) from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise _broken(path, error) from error
    if picture.mode not in MODES:
        picture.close()
        raise ValueError(f"{str(path)!r} is of mode {picture.mode!r}: only pictures of 8 bits a channel are compared")
    return picture


def _broken(path: Path, error: Exception) -> ValueError:
    reason = str(error).replace(str(path), "").strip() or type(error).__name__
    return ValueError(f"{str(path)!r} is no readable picture ({reason}): remove or replace it")


class ShapesPictures(PictureSet):
    """Procedural pictures, `n` of the held-out part, side x side pixels. Their scenes do not depend on `side`."""

    def __init__(self, n: int = SHAPES_PICTURES, side: int = SHAPES_SIDE) -> None:
        self.data = ShapesDataset(n, "heldout", side, SHAPES_SEED)
        self.name = f"procedural shapes, held-out part, seed {SHAPES_SEED}"
        self.sizes = {(side, side): SHAPES}
        code = shapes.code_sha256()
        self.raw_content = text_sha256(code, np.__version__, "heldout", n, side, SHAPES_SEED)

    def __len__(self) -> int:
        return len(self.data)

    def picture(self, index: int) -> Image.Image:
        return self.data.picture(index)


def text_sha256(*parts: str | int) -> str:
    """Return the SHA-256 of a list of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- sources -----------------------------------------------------------------------------------------------


def open_source(
    source: str,
    *,
    what: str,
    limit: int | None = None,
    per_class: int = PER_CLASS,
    shapes_side: int = SHAPES_SIDE,
) -> PictureSet:
    """Open the pictures that `source` names.

    source: "shapes", imagenet:DIR, coco:DIR, a folder, or a name that torch-fidelity knows. what: the role of these
    pictures in the comparison, for messages. limit: take the first so many (None: all; of shapes, which has no end,
    5000). per_class: pictures of each class of ImageNet. shapes_side: pixels of a side of shapes.
    Raises ValueError if there are no such pictures.
    """
    if source == SHAPES:
        return ShapesPictures(limit or SHAPES_PICTURES, shapes_side)
    kind, colon, place = source.partition(":")
    if colon and kind in (IMAGENET, COCO):
        if kind == IMAGENET and limit is not None:
            raise ValueError("the first pictures of imagenet are those of its first classes: use --per_class instead")
        folder = _existing(Path(place), what)
        paths = imagenet_files(folder, per_class) if kind == IMAGENET else coco_files(folder)
        return FilePictures(source, paths[:limit])
    if not Path(source).exists():
        from dsdiff.images.registered import RegisteredPictures, registered_names

        if source in registered_names():
            return RegisteredPictures(source, limit)
    return open_folder(_existing(Path(source), what), limit)


def choose_framing(mode: str, size: int | None, pictures: PictureSet) -> Framing:
    """Return the framing of a resize mode. Without a size it is the side of `pictures`.

    Raises ValueError if no size is given and `pictures` are not all squares of one size.
    """
    if mode == "none":
        return Framing()
    if size is None:
        width, height = next(iter(pictures.sizes))
        if len(pictures.sizes) > 1 or width != height:
            raise ValueError(f"{pictures.name}: not all of one square size, so --resize {mode} needs a --size")
        size = width
    return Framing(mode=mode, size=size)


def open_folder(folder: Path, limit: int | None = None) -> FilePictures:
    """Open the first `limit` pictures in `folder` and below.

    In an --outdir of txt2img.py only the samples count, since grids lie beside them.
    """
    samples = folder / "samples"
    of_txt2img = (folder / "settings.yaml").is_file() and samples.is_dir()
    return FilePictures(f"folder {folder}", picture_files(samples if of_txt2img else folder)[:limit])


def _existing(folder: Path, what: str) -> Path:
    """Return `folder`. Raises ValueError, with all that a source can be, if it is no folder."""
    if not folder.is_dir():
        from dsdiff.images.registered import registered_names

        known = ", ".join(registered_names())
        raise ValueError(
            f"no {what} at {str(folder)!r}: give a folder, shapes, imagenet:DIR, coco:DIR or one of {known}"
        )
    return folder


def picture_files(folder: Path) -> list[Path]:
    """Return the paths of all pictures in `folder` and below, sorted. Raises ValueError if there are none."""
    found = [
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise ValueError(f"no pictures in {str(folder)!r}: files must end in one of {', '.join(SUFFIXES)}")
    return sorted(found, key=str)


def imagenet_files(folder: Path, per_class: int) -> list[Path]:
    """Return the first `per_class` pictures of each class, sorted. `folder`, or its `val`, has one folder a class."""
    place = folder / "val" if (folder / "val").is_dir() else folder
    classes = sorted(path for path in place.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"no class folders in {str(place)!r}: sort the validation pictures into one folder a class")
    chosen = [picture_files(path)[:per_class] for path in classes]
    few = sum(len(files) < per_class for files in chosen)
    if few or len(classes) != IMAGENET_CLASSES:
        logger.warning("imagenet: %d classes, %d of them with fewer than %d pictures", len(classes), few, per_class)
    return [path for files in chosen for path in files]


def coco_files(folder: Path) -> list[Path]:
    """Return the pictures of val2017 or val2014 in `folder`, or of `folder` itself. Raises ValueError for both."""
    parts = [folder / name for name in ("val2017", "val2014") if (folder / name).is_dir()]
    if len(parts) > 1:
        raise ValueError(f"{str(folder)!r} holds val2014 and val2017: give coco:{parts[0]} or coco:{parts[1]}")
    return picture_files(parts[0] if parts else folder)
