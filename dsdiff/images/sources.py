"""The names of sets of pictures, and how pictures are brought to one size. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import PIL
from PIL import Image

SHAPES = "shapes"  # the source of procedural pictures, and the extractor that reads them
SHAPES_PICTURES = 5000
SHAPES_SIDE = 128  # pixels; what the reader of shapes was trained on
SHAPES_SEED = 20_000  # no other command draws from it, so that no real picture is scored against itself
IMAGENET, COCO = "imagenet", "coco"  # sources are written imagenet:DIR and coco:DIR
PER_CLASS = 5  # pictures of each class of ImageNet that a set takes by default

RESIZES = ("none", "squash", "center-crop")

Size = tuple[int, int]  # width, height


def is_imagenet(source: str | None) -> bool:
    """Return whether a source is written imagenet:DIR."""
    return source is not None and source.startswith(f"{IMAGENET}:")


def size_text(size: Sequence[int]) -> str:
    """Return a size as text, width first: 128x64."""
    return "x".join(str(length) for length in size)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Brings pictures to size x size pixels.

    mode: one of RESIZES. none leaves pictures as they are, and `size` must be None. squash resizes them whatever their
    shape. center-crop cuts out the largest square in the middle and resizes that. A picture that already has the size
    is not touched. Raises ValueError for an unknown mode, and for a size that is missing or has no effect.
    """

    mode: str = "none"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in RESIZES or (self.size is None) != (self.mode == "none"):
            raise ValueError(f"resize {self.mode!r} to {self.size}: choose one of {', '.join(RESIZES)}, and a size")

    def __str__(self) -> str:
        if self.size is None:
            return "none"
        return f"{self.mode} to {self.size}x{self.size}, bicubic with anti-aliasing (Pillow {PIL.__version__})"

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.size is None or picture.size == (self.size, self.size):
            return picture
        if self.mode == "center-crop":
            side = min(picture.size)
            left, top = ((length - side) // 2 for length in picture.size)
            picture = picture.crop((left, top, left + side, top + side))
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
