"""Turn the page's fields into requests for the studio, and into the variants of a comparison."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dsdiff.models.spec import ModelSpec
from dsdiff.options import DrawOptions
from dsdiff.server.names import find_sampler
from dsdiff.server.requests import DrawRequest, any_seed, merge_of, split_loras
from dsdiff.server.shelf import Shelf

Number = TypeVar("Number", int, float)

AUTOMATIC = "automatic"
MAX_VARIANTS = 12


@dataclass(frozen=True, kw_only=True)
class Form:
    """The fields of the page, as they were filled in. seed -1 is any. vae: a decoder, or AUTOMATIC."""

    prompt: str
    negative: str = ""
    model: str
    sampler: str = "DDIM"
    steps: float
    scale: float
    seed: float = -1
    width: float
    height: float
    pictures: float = 1
    ratio: float = 0.0
    proportional: bool = False
    cache: float = 1
    vae: str = AUTOMATIC

    def request(self, shelf: Shelf) -> DrawRequest:
        """Return what the fields ask for. Raises ValueError for what cannot be."""
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: write what to draw")
        prompt, loras = split_loras(self.prompt.strip(), shelf.lora)
        sampler = find_sampler(self.sampler)
        seed = _whole("the seed", self.seed)
        options = DrawOptions(
            height=_whole("the height", self.height),
            width=_whole("the width", self.width),
            sampler=sampler,
            steps=_whole("the number of steps", self.steps),
            scale=float(self.scale),
            negative_prompt=self.negative.strip(),
            prompt_weights=shelf.choice.prompt_weights,
            long_prompts=shelf.choice.long_prompts,
            precision=shelf.choice.precision,
            cache=_whole("the cache", self.cache),
            vae=None if self.vae == AUTOMATIC else self.vae,
            merge=merge_of(self.ratio, self.proportional),
        )
        return DrawRequest(
            prompt=prompt,
            seed=any_seed() if seed == -1 else seed,
            pictures=_whole("the number of pictures", self.pictures),
            model=self.model,
            loras=loras,
            options=options,
        )


def defaults(spec: ModelSpec, side: int) -> tuple[int, float, int, int]:
    """Return a model's steps, scale, width and height; none longer than `side`."""
    return spec.steps, spec.scale, min(spec.width, side), min(spec.height, side)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the settings that a comparison draws with."""

    model: str
    ratio: float
    steps: int

    @property
    def title(self) -> str:
        """The settings in a line."""
        merged = f", ratio {self.ratio:g}" if self.ratio else ""
        return f"{self.model}{merged}, {self.steps} steps"


def variants(models: Sequence[str], ratios: str, steps: str) -> list[Variant]:
    """Return all combinations of models, ratios and steps, each model's together, in the order given.

    ratios, steps: numbers with commas between them. Raises ValueError for none, for too many, or for other text.
    """
    if not models:
        raise ValueError("choose at least one model")
    every = itertools.product(dict.fromkeys(models), _numbers("ratios", ratios, float), _numbers("steps", steps, int))
    found = [Variant(model=model, ratio=ratio, steps=count) for model, ratio, count in every]
    if len(found) > MAX_VARIANTS:
        raise ValueError(f"these are {len(found)} pictures: choose {MAX_VARIANTS} at most")
    return found


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        numbers = [kind(part) for part in re.split(r"[,\s]+", text.strip()) if part]
    except ValueError as error:
        raise ValueError(f"{name} are {text!r}: write numbers with commas between them") from error
    if not numbers:
        raise ValueError(f"there are no {name}: write one number at least")
    return list(dict.fromkeys(numbers))


def _whole(name: str, value: float | None) -> int:
    if value is None or value != int(value):
        raise ValueError(f"{name} is {value}: it must be a whole number")
    return int(value)
