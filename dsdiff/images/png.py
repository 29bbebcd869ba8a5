"""Files of the commands: prompts they read, pictures they write."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qdiff.files import write_atomically


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


def read_prompt_file(path: Path, flag: str) -> list[str]:
    """The prompts in a text file, one a line, that `flag` names. Raises ValueError if it holds none or is no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {str(path)!r} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} {str(path)!r} holds no prompts: write one per line")
    return prompts


def write_png(path: Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with the given text chunks."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))
