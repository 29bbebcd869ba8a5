"""Pictures as the API passes them: PNG in base64."""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageOps

from dsdiff.images.init import FileRecord
from dsdiff.images.png import png_bytes

# Formats that are read. Pillow knows more: EPS, for one, would be given to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def png_base64(image: Image.Image, texts: Mapping[str, str] | None = None) -> str:
    """Return a picture as PNG with the given text chunks, in base64."""
    return _to_base64(png_bytes(image, texts))


def preview_base64(image: Image.Image) -> str:
    """Return a picture as PNG in base64, compressed little and fast, as it is seen for a moment only."""
    return _to_base64(png_bytes(image, compress_level=1))


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def from_base64(text: str, name: str) -> bytes:
    """Return the bytes of base64, with or without a data URL's beginning. Raises ValueError for other text.

    name: the field, for messages.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is no picture in base64: {error}") from error


def open_picture(data: bytes, name: str, most: int) -> Image.Image:
    """Return the picture in bytes, turned as the camera says.

    name: the field, for messages. Raises ValueError for other bytes, and for a picture of more than `most` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height <= most:
                picture.load()
                return ImageOps.exif_transpose(picture)
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{name} is no picture that can be read: send {', '.join(FORMATS)}") from error
    raise ValueError(f"{name} has {width}x{height} pixels: this server takes {most} at most")


def record_of(data: bytes) -> FileRecord:
    """Return the record of a picture that came without a file: its name is the beginning of its hash."""
    digest = hashlib.sha256(data).hexdigest()
    return FileRecord(path=Path(digest[:12]), sha256=digest)
