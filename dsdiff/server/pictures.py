"""Pictures as the API passes them: base64, PNG with text chunks."""

import base64
import binascii
import hashlib
import io
from pathlib import Path

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dsdiff.images.init import FileRecord
from dsdiff.server.requests import Drawn


def png_bytes(picture: Drawn) -> bytes:
    """Return the PNG of a picture with its text chunks."""
    info = PngInfo()
    for key, text in picture.texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    picture.image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def preview_base64(image: Image.Image) -> str:
    """Return a preview as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return to_base64(buffer.getvalue())


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
    """Return the picture in bytes, turned as the camera says. Raises ValueError for none, or one of more pixels."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height <= most:
                picture.load()
                return ImageOps.exif_transpose(picture)
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{name} is no picture that can be read") from error
    raise ValueError(f"{name} has {width}x{height} pixels: this server takes {most} at most")


def record_of(data: bytes) -> FileRecord:
    """Return the record of a picture that came without a file: its name is the beginning of its hash."""
    digest = hashlib.sha256(data).hexdigest()
    return FileRecord(path=Path(digest[:12]), sha256=digest)
