"""Requests for pictures, whoever asks, and the drawings that answer them."""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from PIL import Image

from dsdiff.draw_settings import DrawSettings
from dsdiff.images.init import FileRecord
from dsdiff.options import DrawOptions, LoraOptions, MergeOptions
from dsdiff.prompt_rows import MAX_SEED
from dsdiff.server.options import Limits

LORA_TAG = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Pictures to draw.

    prompt: without LoRAs. seed: of the first picture; picture i has seed + i. pictures: in all. batch_size: pictures
    drawn at a time. model: a title on the shelf. loras: on top of those that the server was started with.
    init, mask: the picture to draw from and its mask; options.init says how. init_file: its name and hash for records.
    """

    prompt: str
    seed: int
    pictures: int = 1
    batch_size: int = 1
    model: str
    loras: tuple[LoraOptions, ...] = ()
    options: DrawOptions = field(default_factory=DrawOptions)
    init: Image.Image | None = None
    mask: Image.Image | None = None
    init_file: FileRecord | None = None

    def check(self, limits: Limits) -> None:
        """Raise ValueError for a request beyond the limits, as far as it tells without its model."""
        if not 0 <= self.seed <= MAX_SEED - self.pictures:
            raise ValueError(f"seed is {self.seed}: it must be in 0..{MAX_SEED - self.pictures}, or -1 for any")
        options = self.options
        texts = (("the prompt", self.prompt), ("the negative prompt", options.negative_prompt))
        for name, text in texts:
            if len(text) > limits.prompt:
                raise ValueError(f"{name} has {len(text)} characters: this server takes {limits.prompt} at most")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{name} has half a letter in it (a surrogate without its pair): leave it out")
        for name, value, most in (
            ("width", options.width, limits.side),
            ("height", options.height, limits.side),
            ("steps", options.steps, limits.steps),
            ("batch_size", self.batch_size, limits.batch),
            ("the number of pictures", self.pictures, limits.pictures),
        ):
            if value is not None and value > most:
                raise ValueError(f"{name} is {value}: this server takes {most} at most")

    def check_settings(self, settings: DrawSettings, limits: Limits) -> None:
        """Raise ValueError where the model's own sizes or steps are beyond the limits."""
        for name, value, most in (
            ("width", settings.width, limits.side),
            ("height", settings.height, limits.side),
            ("steps", settings.steps, limits.steps),
        ):
            if value > most:
                raise ValueError(f"{name} is {value}, by the model: this server takes {most} at most")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture with its text chunks; whole: False for one that was stopped midway."""

    image: Image.Image
    seed: int
    texts: dict[str, str]
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The answer to a DrawRequest.

    pictures: fewer than asked for if it was interrupted. seconds: of drawing, without reading the model. memory: the
    most bytes of its own that the process held meanwhile, the model included, mapped files not.
    """

    request: DrawRequest
    settings: DrawSettings
    pictures: list[Drawn]
    seconds: float
    memory: int
    interrupted: bool = False
    finished: datetime = field(default_factory=datetime.now)


def any_seed() -> int:
    """Return a seed that nobody chose."""
    return secrets.randbelow(2**32)


def merge_of(ratio: float, proportional: bool) -> MergeOptions | None:
    """Return how tokens are merged, as two settings say; None for a ratio of 0, with which the other has no effect."""
    return MergeOptions(ratio=ratio, proportional=proportional) if ratio else None


def split_loras(prompt: str, find: Callable[[str, float], LoraOptions]) -> tuple[str, tuple[LoraOptions, ...]]:
    """Return a prompt without its <lora:NAME:SCALE>, and those LoRAs, by `find`. No scale is 1.

    Raises ValueError for a scale that is no number, and what `find` raises.
    """
    loras = []
    for name, scale in LORA_TAG.findall(prompt):
        try:
            loras.append(find(name.strip(), float(scale) if scale else 1.0))
        except ValueError as error:
            raise ValueError(f"<lora:{name}{':' * bool(scale)}{scale}>: {error}") from error
    return LORA_TAG.sub("", prompt).strip() if loras else prompt, tuple(loras)
