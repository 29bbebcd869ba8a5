"""Sets of pictures to score: folders, data sets, procedural pictures; and how they are brought to one size."""

import copy
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.registry import DATASETS_REGISTRY, register_dataset
from tqdm import tqdm

from dsdiff.cli.console import logger
from ldm.data import shapes
from ldm.data.shapes import ShapesDataset
from ldm.fileio import file_sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits or less, which RGB can hold
RESIZES = ("none", "squash", "center-crop")
SHAPES = "shapes"
SHAPES_PICTURES = 5000
SHAPES_SIDE = 128
SHAPES_SEED = (
    20_000  # no other command draws these: real pictures scored against them are not scored against themselves
)
IMAGENET_CLASSES = 1000

Size = tuple[int, int]  # width, height


# --- one size ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How pictures are brought to size x size pixels.

    none: left as they are; size is None. squash: resized whatever their shape. center-crop: the largest square in the
    middle is cut out and resized. A picture of that size already stays as it is.
    """

    mode: str = "none"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in RESIZES or (self.size is None) != (self.mode == "none"):
            raise ValueError(f"resize {self.mode!r} to {self.size}: choose one of {', '.join(RESIZES)}, and a size")

    def __str__(self) -> str:
        if self.mode == "none":
            return "none"
        return f"{self.mode} to {self.size}x{self.size}, bicubic with anti-aliasing (Pillow {PIL.__version__})"

    def __call__(self, picture: Image.Image) -> Image.Image:
        target = (self.size, self.size)
        if self.mode == "none" or picture.size == target:
            return picture
        if self.mode == "center-crop":
            side = min(picture.size)
            left, top = ((length - side) // 2 for length in picture.size)
            picture = picture.crop((left, top, left + side, top + side))
        return picture.resize(target, Image.Resampling.BICUBIC)


def choose_framing(mode: str, size: int | None, pictures: "PictureSet") -> Framing:
    """What --resize and --size mean; without --size the side of `pictures`. ValueError if that is not defined."""
    if mode == "none":
        return Framing()
    if size is None:
        width, height = next(iter(pictures.sizes))
        if len(pictures.sizes) > 1 or width != height:
            raise ValueError(f"{pictures.name}: not all of one square size, so --resize {mode} needs a --size")
        size = width
    return Framing(mode=mode, size=size)


# --- sets --------------------------------------------------------------------------------------------------


class PictureSet(Dataset, ABC):
    """Pictures as torch-fidelity takes them: items are uint8 [3, height, width], RGB.

    name: what they are, in words. sizes: before framing -> an example that has it. raw_content: tells them from others.
    """

    name: str
    sizes: Mapping[Size, str]
    raw_content: str
    framing = Framing()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Picture `index` as RGB, before framing. ValueError if it cannot be read."""

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        pixels = np.asarray(self.framing(self.picture(index)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def framed(self, framing: Framing) -> "PictureSet":
        """The same pictures, all of one size. ValueError if `framing` leaves them several."""
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
        """Of all pictures once they are framed."""
        return next(iter(self.sizes)) if self.framing.mode == "none" else (self.framing.size,) * 2

    @property
    def content(self) -> str:
        """SHA-256 of all that the items depend on."""
        return text_sha256(self.raw_content, str(self.framing), PIL.__version__)

    def facts(self) -> dict[str, str | int | list[int]]:
        """What to store about them."""
        return {"source": self.name, "n": len(self), "size": list(self.size), "content_sha256": self.content}

    def __str__(self) -> str:
        return f"{self.name}: {len(self)} pictures, {size_text(self.size)}"


class FilePictures(PictureSet):
    """The pictures of `paths`, in their order. Reads all files once, for their hashes and sizes."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self.paths = list(paths)
        self.hashes, self.sizes = [], {}
        for path in tqdm(self.paths, desc="reading", unit="file", leave=False):
            content = path.read_bytes()
            self.hashes.append(hashlib.sha256(content).hexdigest())
            with open_picture(path, content) as picture:
                self.sizes.setdefault(picture.size, path.name)

    @property
    def raw_content(self) -> str:
        return text_sha256(*self.hashes)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int]) -> "FilePictures":
        """Those pictures alone, in that order."""
        other = copy.copy(self)
        other.paths = [self.paths[i] for i in indices]
        other.hashes = [self.hashes[i] for i in indices]
        return other

    def picture(self, index: int) -> Image.Image:
        path = self.paths[index]
        with open_picture(path) as picture:
            try:
                return picture.convert("RGB")
            except Exception as error:  # whatever a damaged file leads to
                raise _broken(path, error) from error

    def prompt_and_seed(self, index: int) -> tuple[str, str]:
        """As scripts/txt2img.py writes them into a PNG. ValueError if the file holds none."""
        path = self.paths[index]
        with open_picture(path) as picture:
            if "prompt" not in picture.info or "seed" not in picture.info:
                raise ValueError(f"{str(path)!r} holds no prompt and seed: pictures to pair must come from txt2img.py")
            return str(picture.info["prompt"]), str(picture.info["seed"])


def open_picture(path: Path, content: bytes | None = None) -> Image.Image:
    """The file's header is read, its pixels are not yet. ValueError if it is no picture of 8 bits."""
    try:
        picture = Image.open(path if content is None else io.BytesIO(content))
    except OSError as error:
        if error.strerror:  # not there, not readable
            raise
        raise _broken(path, error) from error
    except Exception as error:  # whatever a damaged file leads to
        raise _broken(path, error) from error
    if picture.mode not in MODES:
        picture.close()
        raise ValueError(f"{str(path)!r} is of mode {picture.mode!r}: only pictures of 8 bits a channel are compared")
    return picture


def _broken(path: Path, error: Exception) -> ValueError:
    reason = str(error).replace(str(path), "").strip() or type(error).__name__
    return ValueError(f"{str(path)!r} is no readable picture ({reason}): remove or replace it")


class ShapesPictures(PictureSet):
    """`n` procedural pictures of the held-out part, side x side pixels; which ones does not depend on `side`."""

    def __init__(self, n: int = SHAPES_PICTURES, side: int = SHAPES_SIDE) -> None:
        self.data = ShapesDataset(n, "heldout", side, SHAPES_SEED)
        self.name = f"procedural shapes, held-out part, seed {SHAPES_SEED}"
        self.sizes = {(side, side): SHAPES}
        code = file_sha256(Path(shapes.__file__))
        self.raw_content = text_sha256(code, np.__version__, "heldout", n, side, SHAPES_SEED)

    def __len__(self) -> int:
        return len(self.data)

    def picture(self, index: int) -> Image.Image:
        return self.data.picture(index)


class RegisteredPictures(PictureSet):
    """The first pictures of a data set that torch-fidelity knows by name, such as cifar10-val."""

    def __init__(self, name: str, limit: int | None = None, root: Path | None = None) -> None:
        self.name = f"torch-fidelity's {name}"
        root = root or Path(torch.hub.get_dir()).parent / "fidelity_datasets"  # torch-fidelity's own place
        root.mkdir(parents=True, exist_ok=True)
        try:
            self.data = DATASETS_REGISTRY[name](str(root), True)
        except (URLError, RuntimeError) as error:
            raise ValueError(f"data set {name!r} is not under {str(root)!r} and cannot be fetched: {error}") from error
        self.length = min(limit or len(self.data), len(self.data))
        digest, self.sizes = hashlib.sha256(), {}
        for i in tqdm(range(self.length), desc="reading", unit="picture", leave=False):
            item = self.data[i].contiguous()
            digest.update(item.numpy().tobytes())
            self.sizes.setdefault((item.shape[2], item.shape[1]), f"picture {i}")
        self.raw_content = text_sha256(digest.hexdigest(), str(self.sizes))

    def __len__(self) -> int:
        return self.length

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.data[index].permute(1, 2, 0).numpy())


def size_text(size: Sequence[int]) -> str:
    """128x64: width, then height."""
    return "x".join(str(length) for length in size)


def text_sha256(*parts: str | int) -> str:
    """The SHA-256 of a list of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- sources -----------------------------------------------------------------------------------------------


def open_source(
    source: str, *, what: str, limit: int | None = None, per_class: int = 5, shapes_side: int = SHAPES_SIDE
) -> PictureSet:
    """The pictures that `source` names: a folder, shapes, imagenet:DIR, coco:DIR or a name that torch-fidelity knows.

    what: its part in the comparison, for messages. limit: the first so many (of shapes, which has no end, 5000 without
    it). per_class: of imagenet. shapes_side: in pixels. ValueError if there are none.
    """
    if source == SHAPES:
        return ShapesPictures(limit or SHAPES_PICTURES, shapes_side)
    if source in DATASETS_REGISTRY and not Path(source).exists():
        return RegisteredPictures(source, limit)
    kind, colon, place = source.partition(":")
    lists: dict[str, Callable[[Path], list[Path]]] = {
        "imagenet": lambda folder: imagenet_files(folder, per_class),
        "coco": coco_files,
    }
    if colon and kind in lists:
        if kind == "imagenet" and limit is not None:
            raise ValueError("the first pictures of imagenet are those of its first classes: use --per_class instead")
        _require_folder(Path(place), what)
        return FilePictures(source, lists[kind](Path(place))[:limit])
    _require_folder(Path(source), what)
    return open_folder(Path(source), limit)


def open_folder(folder: Path, limit: int | None = None) -> FilePictures:
    """The first `limit` pictures in `folder` and below; of an --outdir of txt2img.py of its samples alone."""
    samples = folder / "samples"
    of_txt2img = (folder / "settings.yaml").is_file() and samples.is_dir()  # grids lie beside the samples
    return FilePictures(f"folder {folder}", picture_files(samples if of_txt2img else folder)[:limit])


def _require_folder(folder: Path, what: str) -> None:
    if not folder.is_dir():
        known = ", ".join(name for name in DATASETS_REGISTRY if name != SHAPES)
        raise ValueError(
            f"no {what} at {str(folder)!r}: give a folder, shapes, imagenet:DIR, coco:DIR or one of {known}"
        )


def picture_files(folder: Path) -> list[Path]:
    """Paths of all pictures in `folder` and below, in order. ValueError if there are none."""
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
    """The first `per_class` pictures of each class, one folder a class, in `folder` or its `val`."""
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
    """The pictures of val2017 or val2014 in `folder`, or of `folder` itself."""
    parts = [folder / name for name in ("val2017", "val2014") if (folder / name).is_dir()]
    if len(parts) > 1:
        raise ValueError(f"{str(folder)!r} holds val2014 and val2017: give coco:{parts[0]} or coco:{parts[1]}")
    return picture_files(parts[0] if parts else folder)


if SHAPES not in DATASETS_REGISTRY:  # for torch_fidelity.calculate_metrics(input2="shapes")
    register_dataset(SHAPES, lambda root, download: ShapesPictures())
