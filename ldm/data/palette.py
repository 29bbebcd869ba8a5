"""The colours of the shapes data set: names, shades of each, and how far two of them are apart.

Colours are RGB in [0, 1].
"""

import colorsys
import math

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")

Rgb = tuple[float, float, float]

# (low, high) of hue in degrees, of saturation and of value. People and detectors can tell the names apart: gray is far
# from black and white, brown is dark, pink is pale, orange and yellow are 17 degrees apart.
_SHADES = {
    "red": ((-6, 4), (0.88, 1.0), (0.78, 0.95)),
    "orange": ((26, 33), (0.92, 1.0), (0.96, 1.0)),
    "yellow": ((50, 57), (0.80, 1.0), (0.95, 1.0)),
    "green": ((112, 142), (0.65, 0.95), (0.50, 0.75)),
    "blue": ((212, 230), (0.75, 0.95), (0.65, 0.95)),
    "purple": ((273, 286), (0.62, 0.85), (0.50, 0.70)),
    "pink": ((330, 345), (0.30, 0.46), (0.97, 1.0)),
    "brown": ((20, 28), (0.62, 0.80), (0.38, 0.50)),
    "black": ((0, 360), (0.0, 0.10), (0.02, 0.12)),
    "white": ((0, 360), (0.0, 0.02), (0.96, 1.0)),
    "gray": ((0, 360), (0.0, 0.04), (0.46, 0.60)),
}
# How far the second shade of a texture goes towards white (> 0) or black (< 0). A colour has only one direction if the
# other would lead to another colour (dark orange is brown, light red is pink).
_ACCENTS = {
    "red": (-0.45,),
    "orange": (0.55,),
    "yellow": (-0.30,),
    "green": (-0.50, 0.50),
    "blue": (-0.50, 0.50),
    "purple": (-0.50, 0.48),
    "pink": (0.65,),
    "brown": (0.40,),
    "black": (0.38,),
    "white": (-0.27,),
    "gray": (-0.50, 0.50),
}
MIN_CONTRAST = 0.32  # least RGB distance between an object and the background


def from_hsv(hue: float, saturation: float, value: float) -> Rgb:
    """Return the RGB of a hue in degrees, a saturation and a value in [0, 1]."""
    return colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)


def pick_shade(rng: np.random.Generator, color: str) -> Rgb:
    """Draw a shade of a colour."""
    return from_hsv(*(rng.uniform(low, high) for low, high in _SHADES[color]))


def typical_shade(color: str) -> Rgb:
    """Return the shade in the middle of a colour's ranges."""
    return from_hsv(*((low + high) / 2 for low, high in _SHADES[color]))


def pick_accent(rng: np.random.Generator, shade: Rgb, color: str) -> Rgb:
    """Draw the second shade of a texture, for the first shade and the name of its colour."""
    options = _ACCENTS[color]
    amount = options[rng.integers(len(options))]
    target = 1.0 if amount > 0 else 0.0
    return tuple(c + (target - c) * abs(amount) for c in shade)


def contrast_to(color: Rgb, background: tuple[Rgb, ...]) -> float:
    """Return the least RGB distance from `color` to a plain background, or to any colour of a gradient."""
    start, end = background[0], background[-1]
    along = [e - s for s, e in zip(start, end, strict=True)]
    length = sum(a * a for a in along)
    t = sum(a * (c - s) for a, c, s in zip(along, color, start, strict=True)) / length if length else 0.0
    t = min(max(t, 0.0), 1.0)
    return math.dist(color, [s + t * a for s, a in zip(start, along, strict=True)])
