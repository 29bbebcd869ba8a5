"""PNG files of pictures, with their text chunks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.fileio import write_atomically


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return RGB pictures of images [B, 3, H, W] in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def write_png(path: Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with the given text chunks, atomically."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))


def read_whole_picture(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Return the picture at `path`; None if it is missing, damaged, or not of `size` (width, height)."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # a damaged file raises many types; the picture is drawn again
        return None
    return picture if picture.size == size else None
