"""What the commands write: files that are complete or not there, and pictures."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images [B, 3, H, W] in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def check_writable(directory: Path) -> None:
    """Raise OSError or ValueError if `directory` cannot be made, or nothing can be written to it. Leaves no trace."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write to {str(directory)!r}: {str(existing)!r} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {str(directory)!r}: {error.strerror}; choose another --outdir") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, then rename to `path`: the file is there complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with the given text chunks."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    write_file(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))
