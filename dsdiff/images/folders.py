"""Finding pictures to score: those of a folder, of ImageNet or COCO, and procedural ones."""

import logging
import os
from collections import Counter
from pathlib import Path

from PIL import Image

from dsdiff.images.sets import FilePictures, PictureSet, ShapesPictures
from dsdiff.images.sources import (
    COCO,
    IMAGENET,
    PER_CLASS,
    SHAPES,
    SHAPES_PICTURES,
    SHAPES_SIDE,
    Framing,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGENET_CLASSES = 1000


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
    """Return the paths of all pictures in `folder` and below, sorted. Raises ValueError if there are none.

    Warns of pictures in other formats, and of links to folders, which are not followed.
    """
    places = list(os.walk(folder))
    files = [Path(place, name) for place, _, names in places for name in names if not name.startswith(".")]
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"no pictures in {str(folder)!r}: files must end in one of {', '.join(SUFFIXES)}")
    other = Counter(path.suffix.lower() for path in files) & Counter(dict.fromkeys(_other_suffixes(), len(files)))
    if other:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(other.items()))
        logger.warning("%s: pictures in other formats are left out: %s", folder, kinds)
    links = [Path(place, name) for place, names, _ in places for name in names if Path(place, name).is_symlink()]
    if links:
        logger.warning("%s: links to folders are not followed, as %r", folder, str(links[0]))
    return sorted(found, key=str)


def _other_suffixes() -> set[str]:
    """Return the suffixes of pictures that Pillow could read, but that are not scored."""
    readable = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    return readable - set(SUFFIXES)


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
