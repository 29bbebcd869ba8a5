"""Captions that contradict a picture although they read nearly alike, and a data set of pictures with such captions.

A CLIP learns from them what its text tower must tell apart: most of these captions have the same words as the true one
in another meaning, such as "a red circle left of a blue star" and "a blue star left of a red circle".
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import (
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    ObjectSpec,
    SceneSpec,
    caption,
    held_out,
    hides_an_object,
    pick,
    propose_object,
)
from ldm.data.palette import COLORS
from ldm.data.reader import CLASSES, augment
from ldm.data.shapes import ShapesDataset, render

T = TypeVar("T")
Objects = tuple[ObjectSpec, ...]


# ------------------------------------------------------------------------------------- one kind of change each


def _relation(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Put the first object on another side of the second."""
    return replace(spec, relation=_another(rng, spec.relation, RELATIONS))


def _order(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Exchange the objects: the same words, the opposite arrangement."""
    return replace(spec, objects=spec.objects[::-1])


def _colors(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Exchange two colours: those of the two objects, or of an object and a plain background."""
    if len(spec.objects) == 2:
        return replace(spec, objects=_exchanged(spec.objects, "color"))
    (background,) = spec.background
    return replace(spec, objects=(replace(spec.objects[0], color=background),), background=(spec.objects[0].color,))


def _color(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Give an object another colour."""
    return _changed(rng, spec, "color", COLORS)


def _shape(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Give an object another shape."""
    return _changed(rng, spec, "shape", SHAPES)


def _texture(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Give an object another texture, or exchange those of the two."""
    return _exchanged_or_changed(rng, spec, "texture", (None, *TEXTURES))


def _size(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Give an object another size, or exchange those of the two."""
    return _exchanged_or_changed(rng, spec, "size", (None, *SIZES))


def _count(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Leave out one of two objects, or add one."""
    if len(spec.objects) == 2:
        return replace(spec, objects=(pick(rng, spec.objects),), relation=None)
    objects = (spec.objects[0], propose_object(rng))
    return replace(spec, objects=objects if rng.random() < 0.5 else objects[::-1], relation=pick(rng, RELATIONS))


def _background(rng: np.random.Generator, spec: SceneSpec) -> SceneSpec:
    """Give the background, or one end of its gradient, another colour."""
    colors = list(spec.background)
    place = int(rng.integers(len(colors)))
    colors[place] = _another(rng, colors[place], COLORS)
    return replace(spec, background=tuple(colors))


def _another(rng: np.random.Generator, present: T, values: tuple[T, ...]) -> T:
    """Draw one of `values` other than the present one."""
    return pick(rng, tuple(value for value in values if value != present))


def _changed(rng: np.random.Generator, spec: SceneSpec, field: str, values: tuple[str | None, ...]) -> SceneSpec:
    objects = list(spec.objects)
    place = int(rng.integers(len(objects)))
    objects[place] = replace(objects[place], **{field: _another(rng, getattr(objects[place], field), values)})
    return replace(spec, objects=tuple(objects))


def _exchanged(objects: Objects, field: str) -> Objects:
    first, second = objects
    mine, other = getattr(first, field), getattr(second, field)
    return replace(first, **{field: other}), replace(second, **{field: mine})


def _exchanged_or_changed(
    rng: np.random.Generator, spec: SceneSpec, field: str, values: tuple[str | None, ...]
) -> SceneSpec:
    differ = len({getattr(each, field) for each in spec.objects}) == 2
    if differ and rng.random() < 0.5:
        return replace(spec, objects=_exchanged(spec.objects, field))
    return _changed(rng, spec, field, values)


def _pair(spec: SceneSpec) -> bool:
    return len(spec.objects) == 2


def _has_two_colors(spec: SceneSpec) -> bool:
    if _pair(spec):
        return spec.objects[0].color != spec.objects[1].color
    return len(spec.background) == 1


def _always(spec: SceneSpec) -> bool:
    return True


Change = Callable[[np.random.Generator, SceneSpec], SceneSpec]
Condition = Callable[[SceneSpec], bool]

# Kind of contrast -> the scenes that have it, and the change that makes the caption wrong.
CONTRASTS: Mapping[str, tuple[Condition, Change]] = {
    "relation": (_pair, _relation),
    "order": (_pair, _order),
    "colors": (_has_two_colors, _colors),
    "color": (_always, _color),
    "shape": (_always, _shape),
    "texture": (_always, _texture),
    "size": (_always, _size),
    "count": (_always, _count),
    "background": (lambda spec: bool(spec.background), _background),
}
# The kinds that no bag of words tells apart: who is where, and what has which colour. They take the longest to learn,
# so that an item has all of them that its scene has, before any other.
BINDING = ("relation", "order", "colors")
TRIES = 20


def contradiction(rng: np.random.Generator, spec: SceneSpec, kind: str) -> SceneSpec | None:
    """Draw a caption's content that is wrong for every picture of `spec`, by the kind of CONTRASTS.

    Contents that training never shows are not drawn for a spec that it shows, because a model would learn that such
    captions are always wrong. Return None if the spec has no such contrast, or if TRIES draws found none.
    """
    applies, change = CONTRASTS[kind]
    if not applies(spec):
        return None
    for _ in range(TRIES):
        try:
            wrong = change(rng, spec)
        except ValueError:  # such as an object of the background's colour
            continue
        if not hides_an_object(wrong) and (held_out(spec) or not held_out(wrong)):
            return wrong
    return None


# ---------------------------------------------------------------------------------------------- what lies where

PLACES = ("left", "right", "above", "below", "alone")
_PLACES_OF_PAIR = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}


def arrangement(spec: SceneSpec) -> Tensor:
    """Return what lies in each place: int64 [PLACES, CLASSES], the index of each attribute; -1 where nothing lies."""
    places = ("alone",) if spec.relation is None else _PLACES_OF_PAIR[spec.relation]
    found = torch.full((len(PLACES), len(CLASSES)), -1)
    for place, obj in zip(places, spec.objects, strict=True):
        indices = [values.index(getattr(obj, name)) for name, values in CLASSES.items()]
        found[PLACES.index(place)] = torch.tensor(indices)
    return found


# -------------------------------------------------------------------------------------------------- data set


class ContrastDataset(Dataset):
    """Pictures of ShapesDataset, each with its caption and `contrasts` captions that are wrong.

    Item i depends on (seed, split, i) alone. Items: {"image": float32 [3, resolution, resolution] in [-1, 1],
    "caption": str, "arrangement": int64 [PLACES, CLASSES], "wrong": list of captions, "kinds": their kinds}. An item
    has the kinds of BINDING first, and each kind once before it has one twice.
    augmented: degrade the pictures like decoded latents, see `ldm.data.reader.augment`.
    """

    def __init__(
        self,
        size: int,
        split: str = "train",
        resolution: int = 128,
        seed: int = 0,
        contrasts: int = 6,
        augmented: bool = True,
    ) -> None:
        if contrasts < 1:
            raise ValueError(f"contrasts {contrasts} must be at least 1")
        self.source = ShapesDataset(size, split, resolution, seed)
        self.contrasts = contrasts
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor | str | list[str]]:
        scene = self.source.scene(index)
        rng = np.random.default_rng([self.source.seed, SPLITS.index(self.source.split), int(index), 2])
        picture = render(scene, self.source.resolution)
        if self.augmented:
            image = augment(picture, rng)
        else:
            pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        wrong = self._wrong(rng, scene.spec)
        return {
            "image": image,
            "caption": caption(scene.spec),
            "arrangement": arrangement(scene.spec),
            "wrong": [caption(spec) for _, spec in wrong],
            "kinds": [kind for kind, _ in wrong],
        }

    def _wrong(self, rng: np.random.Generator, spec: SceneSpec) -> list[tuple[str, SceneSpec]]:
        """Draw `contrasts` pairs of a kind and a content of that kind."""
        others = [kind for kind in CONTRASTS if kind not in BINDING]
        found: list[tuple[str, SceneSpec]] = []
        while len(found) < self.contrasts:
            for kind in map(str, (*rng.permutation(BINDING), *rng.permutation(others))):
                wrong = contradiction(rng, spec, kind)
                if wrong is not None and len(found) < self.contrasts:
                    found.append((kind, wrong))
        return found
