"""Scenes of the shapes data set: all that varies between pictures of one caption, drawn at random.

Lengths are fractions of the picture's width, x runs right, y runs down, angles are in degrees.
"""

from dataclasses import dataclass

import numpy as np

from ldm.data.captions import ObjectSpec, SceneSpec, pick
from ldm.data.palette import COLORS, MIN_CONTRAST, Rgb, contrast_to, from_hsv, pick_accent, pick_shade


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object as it is drawn, inside the circle of `radius` around (x, y), in fractions of the width.

    color, accent: RGB in [0, 1]. The accent is the second shade of the texture; None without a texture.
    line_width: width of a ring's band and a cross's arms, as a fraction of the radius.
    period, texture_angle: distance of stripes or dots (fraction of the width), and their direction.
    """

    spec: ObjectSpec
    x: float
    y: float
    radius: float
    rotation: float
    color: Rgb
    accent: Rgb | None
    line_width: float
    period: float
    texture_angle: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that decides a picture.

    background: one RGB in [0, 1], or the two ends of a gradient in the direction `gradient_angle` (0 to the right, 90
    downwards).
    """

    spec: SceneSpec
    objects: tuple[SceneObject, ...]
    background: tuple[Rgb, ...]
    gradient_angle: float


_RADIUS_ALONE = {"small": (0.11, 0.13), None: (0.17, 0.21), "large": (0.26, 0.33)}
_RADIUS_PAIR = {"small": (0.10, 0.12), None: (0.145, 0.17), "large": (0.20, 0.23)}
_MARGIN = 0.02  # between an object and the edge of the picture
_GAP = 0.025  # between two objects
_CENTRE_GAP = 0.30  # least distance of two centres along their relation
_OFF_AXIS = 0.12  # largest distance of two centres across it
# Stripes run diagonally and dots stand in rows, both turned by a few degrees at most. A model as small as ours did not
# learn textures that run in any direction: from the noise at which they are decided, nothing of them can be told.
_TEXTURE_ANGLE = {"striped": 45.0, "dotted": 0.0}
_TEXTURE_TURN = 8.0  # degrees
_MAX_ROTATION = {"square": 8.0, "diamond": 10.0}  # degrees; other shapes: 15


def layout(spec: SceneSpec, rng: np.random.Generator) -> Scene:
    """Draw a scene for a caption: places, radii, rotations, shades and textures."""
    ranges = _RADIUS_ALONE if len(spec.objects) == 1 else _RADIUS_PAIR
    radii = [rng.uniform(*ranges[o.size]) for o in spec.objects]
    shades = [pick_shade(rng, o.color) for o in spec.objects]
    centres = [_place(rng, radii[0])] if len(radii) == 1 else _place_pair(rng, radii, spec.relation)
    return Scene(
        spec=spec,
        objects=tuple(
            _lay_out_object(rng, o, centre, radius, shade)
            for o, centre, radius, shade in zip(spec.objects, centres, radii, shades, strict=True)
        ),
        background=_background(rng, spec, shades),
        gradient_angle=90.0 * rng.integers(4) + rng.uniform(-20, 20),
    )


def _lay_out_object(
    rng: np.random.Generator, spec: ObjectSpec, centre: tuple[float, float], radius: float, shade: Rgb
) -> SceneObject:
    turn = _MAX_ROTATION.get(spec.shape, 15.0)
    wide = 0.06 if spec.texture else 0.0  # a texture needs some room on a ring or a cross
    coarse = 8 / 128 if spec.size == "small" else 11 / 128
    return SceneObject(
        spec=spec,
        x=centre[0],
        y=centre[1],
        radius=radius,
        rotation=rng.uniform(-turn, turn),
        color=shade,
        accent=pick_accent(rng, shade, spec.color) if spec.texture else None,
        line_width=rng.uniform(0.32, 0.42) + wide if spec.shape == "ring" else rng.uniform(0.46, 0.62) + wide,
        period=max(coarse, radius * rng.uniform(0.50, 0.62)),
        texture_angle=_TEXTURE_ANGLE.get(spec.texture or "", 0.0) + rng.uniform(-_TEXTURE_TURN, _TEXTURE_TURN),
    )


def _place(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return rng.uniform(low, high), rng.uniform(low, high)


def _place_pair(rng: np.random.Generator, radii: list[float], relation: str | None) -> list[tuple[float, float]]:
    """Draw the centres of two objects: well apart along the relation, close across it, never touching."""
    first_comes_first = relation in ("left of", "above")
    r_low, r_high = radii if first_comes_first else radii[::-1]
    apart = max(_CENTRE_GAP, r_low + r_high + _GAP)
    top = 1 - r_high - _MARGIN
    low = rng.uniform(r_low + _MARGIN, top - apart)
    high = rng.uniform(low + apart, top)
    along = (low, high) if first_comes_first else (high, low)
    across = _place_across(rng, radii)
    pairs = list(zip(along, across, strict=True))
    return pairs if relation in ("left of", "right of") else [(x, y) for y, x in pairs]


def _place_across(rng: np.random.Generator, radii: list[float]) -> tuple[float, float]:
    r_big, r_small = max(radii), min(radii)
    big = rng.uniform(r_big + _MARGIN, 1 - r_big - _MARGIN)
    low = max(big - _OFF_AXIS, r_small + _MARGIN)
    small = rng.uniform(low, min(big + _OFF_AXIS, 1 - r_small - _MARGIN))
    return (big, small) if radii[0] == r_big else (small, big)


def _background(rng: np.random.Generator, spec: SceneSpec, shades: list[Rgb]) -> tuple[Rgb, ...]:
    """Draw the shades of the background, at least MIN_CONTRAST from those of the objects.

    If 40 tries find none, as for a gradient through the colour of an object, the best of them is returned.
    """
    best, best_contrast = (), -1.0
    for _ in range(40):
        background = tuple(pick_shade(rng, color) for color in spec.background) or (_any_plain(rng),)
        contrast = min(contrast_to(shade, background) for shade in shades)
        if contrast >= MIN_CONTRAST:
            return background
        if contrast > best_contrast:
            best, best_contrast = background, contrast
    return best


def _any_plain(rng: np.random.Generator) -> Rgb:
    """Draw a background that the caption does not mention: mostly white, light gray or a light tint."""
    kind = rng.random()
    if kind < 0.30:
        return pick_shade(rng, "white")
    if kind < 0.50:
        return from_hsv(0, 0, rng.uniform(0.78, 0.92))
    if kind < 0.80:
        return from_hsv(rng.uniform(0, 360), rng.uniform(0.06, 0.20), rng.uniform(0.90, 1.0))
    return pick_shade(rng, pick(rng, COLORS))
