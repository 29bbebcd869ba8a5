"""Pictures to draw from, and masks: read, brought to the size drawn, and put together with what was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from dsdiff.options import InitOptions
from ldm.fileio import file_sha256
from ldm.messages import first_line

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WHITE_FROM = 128  # the least grey of a mask that counts as white where there is no in-between


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A picture's file as settings record it: by its name and the SHA-256 of its bytes, wherever it lies."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        return cls(path=path, sha256=file_sha256(path))

    @property
    def plain(self) -> dict[str, str]:
        return {"name": self.path.name, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class InitPicture:
    """A picture to draw from: RGB, of the size drawn. mask: of the same size, "L", white where it is drawn anew."""

    image: Image.Image
    mask: Image.Image | None = None


# --- files -------------------------------------------------------------------------------------------------


def find_pictures(path: Path, flag: str) -> list[Path]:
    """Return the picture at `path`, or those in the folder there, by name. Raises ValueError or FileNotFoundError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{flag} {str(path)!r} is not there: give a picture, or a folder of pictures")
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{flag} {str(path)!r} holds no pictures ({', '.join(PICTURES)})")
    return found


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height as seen, with the camera's rotation. Reads the header.

    Raises ValueError for a file that is no picture.
    """
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5
            return (picture.height, picture.width) if turned else picture.size
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{str(path)!r} is no picture that can be read: {_line(error)}") from error


def read_picture(path: Path) -> Image.Image:
    """Return the picture at `path`, RGB, turned as the camera says, on white where it is transparent.

    Raises ValueError for a file that is none.
    """
    return flattened(_read(path), "white")


def read_mask(path: Path) -> Image.Image:
    """Return the mask at `path`, "L": 255 where pictures are drawn anew. What is transparent counts as black."""
    return flattened(_read(path), "black").convert("L")


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"{str(path)!r} is no picture that can be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it has no format of pictures"
    return first_line(error)


def flattened(picture: Image.Image, ground: str) -> Image.Image:
    """Return the picture as RGB, on a ground of this colour where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    page = Image.new("RGBA", picture.size, ground)
    return Image.alpha_composite(page, picture.convert("RGBA")).convert("RGB")


# --- size --------------------------------------------------------------------------------------------------


def init_picture(
    image: Image.Image, mask: Image.Image | None, size: tuple[int, int], options: InitOptions
) -> InitPicture:
    """Return picture and mask at `size` (width, height), both changed alike, see InitOptions.

    Raises ValueError for a mask of another size than the picture's, or without anything to draw.
    """
    if mask is None:
        return InitPicture(image=fitted(flattened(image, "white"), size, options.resize))
    if mask.size != image.size:
        raise ValueError(
            f"the mask has {mask.width}x{mask.height} pixels, its picture {image.width}x{image.height}: they must match"
        )
    image, mask = (fitted(each, size, options.resize) for each in (flattened(image, "white"), flattened(mask, "black")))
    mask = mask.convert("L")
    if np.asarray(mask).max() < WHITE_FROM:
        raise ValueError("the mask is black throughout the picture: nothing would be drawn; white is drawn anew")
    return InitPicture(image=image, mask=mask)


def fitted(picture: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """Return a picture at `size` (width, height): cropped at the centre to its shape first, or stretched."""
    if picture.size == size:
        return picture
    if resize == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    return picture.resize(size, Image.Resampling.LANCZOS)


def resize_note(own: tuple[int, int], size: tuple[int, int], resize: str) -> str:
    """Return in words what happens to a picture of a size, "" for nothing."""
    if own == size:
        return ""
    way = "stretched" if resize == "stretch" or own[0] * size[1] == own[1] * size[0] else "scaled and cropped"
    return f"{own[0]}x{own[1]} pixels, {way} to {size[0]}x{size[1]}"


# --- tensors -----------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as [1, 3, H, W], float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def drawn_latents(masks: Sequence[Image.Image | None], factor: int) -> Tensor | None:
    """Return [B, 1, h, w], 1 for each latent with a white pixel and 0 for the others; None if there are no masks."""
    if all(mask is None for mask in masks):
        return None
    white = torch.stack([torch.from_numpy(np.array(mask) >= WHITE_FROM).float()[None] for mask in masks])
    return F.max_pool2d(white, factor)


def pasted(drawn: Image.Image, init: InitPicture, options: InitOptions) -> Image.Image:
    """Return the drawn picture, with the pixels of `init` where its mask, blurred, is black. Grey is a mixture."""
    if init.mask is None or not options.paste:
        return drawn
    mask = init.mask.filter(ImageFilter.GaussianBlur(options.mask_blur)) if options.mask_blur else init.mask
    return Image.composite(drawn, init.image, mask)
