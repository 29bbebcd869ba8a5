"""Sets of pictures to score, their size and content: files, and procedural pictures."""

import copy
import hashlib
import io
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dsdiff.images.sources import (
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

logger = logging.getLogger(__name__)

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits or less, which RGB can hold


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
    """The pictures in the files `paths`, in that order. All files are read once, for their hashes and sizes.

    Transparency is ignored, as torch-fidelity does: the colours of transparent pixels count. A warning tells of it.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self.paths = list(paths)
        self.hashes: list[str] = []
        sizes: dict[Size, str] = {}
        transparent: list[Path] = []
        for path in tqdm(self.paths, desc="reading", unit="file", leave=False):
            content = path.read_bytes()
            self.hashes.append(hashlib.sha256(content).hexdigest())
            with open_picture(path, content) as picture:
                sizes.setdefault(picture.size, path.name)
                if picture.has_transparency_data:
                    transparent.append(path)
        if transparent:
            logger.warning(
                "%s: transparency is ignored in %d pictures, as %r: the colours of transparent pixels count",
                name, len(transparent), transparent[0].name,
            )  # fmt: skip
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
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "no format of pictures" if unknown else str(error).replace(str(path), "").strip() or type(error).__name__
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
