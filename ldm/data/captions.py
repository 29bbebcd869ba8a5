"""The language of the shapes data set: what a caption can say, and captions drawn at random.

Grammar (`size`, `texture`, the second object and the background may be left out)::

    OBJECT [relation OBJECT] [on ARTICLE colour [to colour gradient] background]
    OBJECT = ARTICLE [size] [texture] colour shape
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ldm.data.palette import COLORS, MIN_CONTRAST, contrast_to, typical_shade

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
SIZES = ("small", "large")
TEXTURES = ("striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "test", "heldout")

# Combinations that are never trained on. Each shape lacks one colour, each texture lacks one shape, and two
# arrangements are missing in both wordings ("heart above square" and "square below heart" are the same picture).
HELD_OUT_COLOR_SHAPE = frozenset(
    {
        ("green", "circle"),
        ("blue", "square"),
        ("pink", "triangle"),
        ("purple", "star"),
        ("black", "heart"),
        ("yellow", "ring"),
        ("red", "cross"),
        ("orange", "diamond"),
    }
)
HELD_OUT_TEXTURE_SHAPE = frozenset({("striped", "star"), ("dotted", "diamond")})
HELD_OUT_RELATION = frozenset({("left of", "triangle", "ring"), ("above", "heart", "square")})


# ---------------------------------------------------------------------------------------------- captions


def require(value: str | None, allowed: tuple[str, ...], what: str) -> None:
    """Raise ValueError unless `value` is one of `allowed`; the message calls it `what`."""
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """One object as the caption names it. `size` and `texture` are None if the caption does not mention them."""

    shape: str
    color: str
    size: str | None = None
    texture: str | None = None

    def __post_init__(self) -> None:
        require(self.shape, SHAPES, "shape")
        require(self.color, COLORS, "colour")
        if self.size is not None:
            require(self.size, SIZES, "size")
        if self.texture is not None:
            require(self.texture, TEXTURES, "texture")


@dataclass(frozen=True, kw_only=True)
class SceneSpec:
    """The content of a caption.

    objects: one or two ObjectSpec; two must differ in shape or colour.
    relation: where objects[0] is, seen from objects[1]; None with one object.
    background: () if not mentioned, (colour,) plain, (from, to) gradient; never the colour of an object.
    """

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, got {len(self.objects)}")
        if len(self.objects) == 1 and self.relation is not None:
            raise ValueError(f"relation {self.relation!r} needs two objects: give none with one object")
        if len(self.objects) == 2:
            self._check_pair()
        self._check_background()

    def _check_pair(self) -> None:
        first, second = self.objects
        require(self.relation, RELATIONS, "relation")
        if (first.shape, first.color) == (second.shape, second.color):
            raise ValueError(f"both objects are a {first.color} {first.shape}: change a shape or a colour")

    def _check_background(self) -> None:
        if len(self.background) > 2 or len(set(self.background)) != len(self.background):
            raise ValueError(f"background {self.background!r}: give at most two, different colours")
        for color in self.background:
            require(color, COLORS, "background colour")
            if color in {o.color for o in self.objects}:
                raise ValueError(f"the background is {color} like an object: choose another colour")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(spec: ObjectSpec) -> str:
    words = (spec.size, spec.texture, spec.color, spec.shape)
    return _with_article(" ".join(word for word in words if word))


def caption(spec: SceneSpec) -> str:
    """Return the one caption of `spec`; `parse_caption` is the inverse."""
    text = _name(spec.objects[0])
    if spec.relation is not None:
        text += f" {spec.relation} {_name(spec.objects[1])}"
    if spec.background:
        gradient = " gradient" if len(spec.background) == 2 else ""
        text += f" on {_with_article(' to '.join(spec.background))}{gradient} background"
    return text


def _object_pattern(n: int) -> str:
    size, texture, color, shape = ("|".join(names) for names in (SIZES, TEXTURES, COLORS, SHAPES))
    return (
        rf"an? (?:(?P<size{n}>{size}) )?(?:(?P<texture{n}>{texture}) )?"
        rf"(?P<color{n}>{color}) (?P<shape{n}>{shape})"
    )


_CAPTION = re.compile(
    rf"{_object_pattern(0)}(?: (?P<relation>{'|'.join(RELATIONS)}) {_object_pattern(1)})?"
    rf"(?: on an? (?P<plain>{'|'.join(COLORS)})(?: to (?P<to>{'|'.join(COLORS)}) gradient)? background)?"
)


def parse_caption(text: str) -> SceneSpec:
    """Return the SceneSpec whose caption is `text`. Raise ValueError for a text outside the grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read caption {text!r}: expected something like 'a small red circle'")
    found = match.groupdict()
    fields = ("shape", "color", "size", "texture")
    objects = tuple(
        ObjectSpec(**{field: found[f"{field}{n}"] for field in fields}) for n in (0, 1) if found[f"shape{n}"]
    )
    background = tuple(color for color in (found["plain"], found["to"]) if color)
    spec = SceneSpec(objects=objects, relation=found["relation"], background=background)
    if caption(spec) != text:
        raise ValueError(f"cannot read caption {text!r}: wrong article, did you mean {caption(spec)!r}")
    return spec


# ------------------------------------------------------------------------------------ sampling of captions


def held_out(spec: SceneSpec) -> bool:
    """Tell whether `spec` has a combination that the splits "train" and "test" never show."""
    if any((o.color, o.shape) in HELD_OUT_COLOR_SHAPE for o in spec.objects):
        return True
    if any((o.texture, o.shape) in HELD_OUT_TEXTURE_SHAPE for o in spec.objects):
        return True
    if spec.relation is None:
        return False
    first, second = (o.shape for o in spec.objects)
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    wordings = {(spec.relation, first, second), (mirrored[spec.relation], second, first)}
    return not wordings.isdisjoint(HELD_OUT_RELATION)


def sample_spec(rng: np.random.Generator, split: str = "train") -> SceneSpec:
    """Draw a random SceneSpec, with one object in 40 % of the proposals and two in the others.

    Specs of the splits "train" and "test" have no held-out combination, those of "heldout" at least one.
    """
    require(split, SPLITS, "split")
    while True:
        spec = _propose(rng)
        if spec is not None and held_out(spec) == (split == "heldout"):
            return spec


T = TypeVar("T")


def pick(rng: np.random.Generator, values: tuple[T, ...]) -> T:
    """Draw one of `values`."""
    return values[rng.integers(len(values))]


def _propose(rng: np.random.Generator) -> SceneSpec | None:
    """Draw one proposal; return None if it breaks a rule of SceneSpec or would hide an object."""
    objects = tuple(propose_object(rng) for _ in range(1 if rng.random() < 0.4 else 2))
    relation = pick(rng, RELATIONS) if len(objects) == 2 else None
    background: tuple[str, ...] = ()
    if rng.random() < 0.5:
        background = tuple(pick(rng, COLORS) for _ in range(2 if rng.random() < 0.3 else 1))
    try:
        spec = SceneSpec(objects=objects, relation=relation, background=background)
    except ValueError:
        return None
    return None if hides_an_object(spec) else spec


def propose_object(rng: np.random.Generator) -> ObjectSpec:
    """Draw an object, with a size in half of the cases and a texture in 40 %."""
    return ObjectSpec(
        shape=pick(rng, SHAPES),
        color=pick(rng, COLORS),
        size=pick(rng, SIZES) if rng.random() < 0.5 else None,
        texture=pick(rng, TEXTURES) if rng.random() < 0.4 else None,
    )


def hides_an_object(spec: SceneSpec) -> bool:
    """Tell whether the gradient passes close to the colour of an object, as red to yellow passes orange."""
    if len(spec.background) < 2:
        return False
    ends = tuple(typical_shade(color) for color in spec.background)
    return any(contrast_to(typical_shade(o.color), ends) < MIN_CONTRAST for o in spec.objects)
