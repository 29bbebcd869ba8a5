"""PNG files of pictures, with their text chunks."""

import io
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


def png_bytes(picture: Image.Image, texts: Mapping[str, str] | None = None, *, compress_level: int = 6) -> bytes:
    """Return the bytes of a PNG with the given text chunks. compress_level: 0..9, of zlib."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=compress_level)
    return buffer.getvalue()


def write_png(path: Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with the given text chunks, atomically."""
    data = png_bytes(picture, texts)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def read_whole_picture(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Return the picture at `path`; None if it is missing, damaged, or not of `size` (width, height)."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # a damaged file raises many types; the picture is drawn again
        return None
    return picture if picture.size == size else None
