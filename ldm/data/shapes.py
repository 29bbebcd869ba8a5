"""Captioned procedural pictures of one or two coloured shapes: training set, FID reference and test data.

Three levels, each a plain function of the one before and, where it varies, of a random generator:

    SceneSpec  what the caption says       caption(spec), parse_caption(text), sample_spec(rng, split)
    Scene      where and how it is drawn   layout(spec, rng)
    picture    PIL image                   render(scene, resolution)

Caption grammar (`size`, `texture`, the second object and the background may be left out)::

    OBJECT [relation OBJECT] [on ARTICLE colour [to colour gradient] background]
    OBJECT = ARTICLE [size] [texture] colour shape

Lengths are fractions of the picture's width, x runs right, y runs down, angles are in degrees.
"""

import colorsys
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
SIZES = ("small", "large")
TEXTURES = ("striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "test", "heldout")

# What training never shows. Every shape misses one colour; two textures miss one shape; two arrangements are
# missing, in either wording ("heart above square" and "square below heart" are the same picture).
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

Rgb = tuple[float, float, float]


# ---------------------------------------------------------------------------------------------- captions


def _require(value: str | None, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """One object as the caption names it; `size` and `texture` are None where unmentioned."""

    shape: str
    color: str
    size: str | None = None
    texture: str | None = None

    def __post_init__(self) -> None:
        _require(self.shape, SHAPES, "shape")
        _require(self.color, COLORS, "colour")
        if self.size is not None:
            _require(self.size, SIZES, "size")
        if self.texture is not None:
            _require(self.texture, TEXTURES, "texture")


@dataclass(frozen=True, kw_only=True)
class SceneSpec:
    """All that a caption says.

    objects: one or two ObjectSpec; two must differ in shape or colour.
    relation: how objects[0] stands to objects[1]; None with one object.
    background: () unmentioned, (colour,) plain, (from, to) gradient; never the colour of an object.
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
        _require(self.relation, RELATIONS, "relation")
        if (first.shape, first.color) == (second.shape, second.color):
            raise ValueError(f"both objects are a {first.color} {first.shape}: change a shape or a colour")

    def _check_background(self) -> None:
        if len(self.background) > 2 or len(set(self.background)) != len(self.background):
            raise ValueError(f"background {self.background!r}: give at most two, different colours")
        for color in self.background:
            _require(color, COLORS, "background colour")
            if color in {o.color for o in self.objects}:
                raise ValueError(f"the background is {color} like an object: choose another colour")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(spec: ObjectSpec) -> str:
    words = (spec.size, spec.texture, spec.color, spec.shape)
    return _with_article(" ".join(word for word in words if word))


def caption(spec: SceneSpec) -> str:
    """The one caption of `spec`; `parse_caption` is its inverse."""
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
    """The SceneSpec that `caption` turns into exactly `text`. ValueError for anything outside the grammar."""
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
    """Whether `spec` holds a combination that the split "train" (and "test") never shows."""
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
    """A random SceneSpec: 40% one object, 60% two.

    Specs of the splits "train" and "test" have no held-out combination, those of "heldout" at least one.
    """
    _require(split, SPLITS, "split")
    while True:
        spec = _propose(rng)
        if spec is not None and held_out(spec) == (split == "heldout"):
            return spec


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]


def _propose(rng: np.random.Generator) -> SceneSpec | None:
    """One draw from the mixture; None where it breaks a rule of SceneSpec or would hide an object."""
    objects = tuple(_propose_object(rng) for _ in range(1 if rng.random() < 0.4 else 2))
    relation = _pick(rng, RELATIONS) if len(objects) == 2 else None
    background = ()
    if rng.random() < 0.5:
        background = tuple(_pick(rng, COLORS) for _ in range(2 if rng.random() < 0.3 else 1))
    try:
        spec = SceneSpec(objects=objects, relation=relation, background=background)
    except ValueError:
        return None
    return None if _hides_an_object(spec) else spec


def _propose_object(rng: np.random.Generator) -> ObjectSpec:
    return ObjectSpec(
        shape=_pick(rng, SHAPES),
        color=_pick(rng, COLORS),
        size=_pick(rng, SIZES) if rng.random() < 0.5 else None,
        texture=_pick(rng, TEXTURES) if rng.random() < 0.4 else None,
    )


def _hides_an_object(spec: SceneSpec) -> bool:
    """Whether the gradient passes close to the colour of an object, as red to yellow does to orange."""
    if len(spec.background) < 2:
        return False
    ends = tuple(_typical_shade(color) for color in spec.background)
    return any(_contrast(_typical_shade(o.color), ends) < _MIN_CONTRAST for o in spec.objects)


# --------------------------------------------------------------------------------------------- colours

# (low, high) of hue in degrees, saturation and value. The names stay separable for an eye and for a detector:
# gray keeps off black and white, brown is dark, pink is pale, orange and yellow are 17 degrees apart.
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
# How far a texture's second shade goes towards white (> 0) or black (< 0). A colour that would turn into the
# name of another one (dark orange is brown, light red is pink) has one direction only.
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
_MIN_CONTRAST = 0.32  # distance of RGB triples in [0, 1] between an object and what lies behind it


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    return colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)


def _shade(rng: np.random.Generator, color: str) -> Rgb:
    return _hsv(*(rng.uniform(low, high) for low, high in _SHADES[color]))


def _typical_shade(color: str) -> Rgb:
    return _hsv(*((low + high) / 2 for low, high in _SHADES[color]))


def _accent(rng: np.random.Generator, shade: Rgb, color: str) -> Rgb:
    options = _ACCENTS[color]
    amount = options[rng.integers(len(options))]
    target = 1.0 if amount > 0 else 0.0
    return tuple(c + (target - c) * abs(amount) for c in shade)


def _contrast(color: Rgb, background: tuple[Rgb, ...]) -> float:
    """Smallest RGB distance from `color` to a plain background or to the line between a gradient's ends."""
    start, end = background[0], background[-1]
    along = [e - s for s, e in zip(start, end, strict=True)]
    length = sum(a * a for a in along)
    t = sum(a * (c - s) for a, c, s in zip(along, color, start, strict=True)) / length if length else 0.0
    t = min(max(t, 0.0), 1.0)
    return math.dist(color, [s + t * a for s, a in zip(start, along, strict=True)])


def _background(rng: np.random.Generator, spec: SceneSpec, shades: list[Rgb]) -> tuple[Rgb, ...]:
    """Shades of the background, well apart from the objects' shades. A caption may ask for a gradient through
    an object's colour: then the best of the tries is taken."""
    best, best_contrast = (), -1.0
    for _ in range(40):
        background = tuple(_shade(rng, color) for color in spec.background) or (_any_plain(rng),)
        contrast = min(_contrast(shade, background) for shade in shades)
        if contrast >= _MIN_CONTRAST:
            return background
        if contrast > best_contrast:
            best, best_contrast = background, contrast
    return best


def _any_plain(rng: np.random.Generator) -> Rgb:
    """What lies behind the objects when the caption is silent: mostly white, light gray or a light tint."""
    kind = rng.random()
    if kind < 0.30:
        return _shade(rng, "white")
    if kind < 0.50:
        return _hsv(0, 0, rng.uniform(0.78, 0.92))
    if kind < 0.80:
        return _hsv(rng.uniform(0, 360), rng.uniform(0.06, 0.20), rng.uniform(0.90, 1.0))
    return _shade(rng, _pick(rng, COLORS))


# ---------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object as drawn: inside the circle of `radius` around (x, y), all in fractions of the width.

    color, accent: RGB in [0, 1]; the accent is the texture's second shade, None without texture.
    line_width: of a ring's band and a cross's arms, as a fraction of the radius.
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
    """A picture in full. background: one RGB in [0, 1], or the two ends of a gradient that runs along
    `gradient_angle` (0 left to right, 90 downwards)."""

    spec: SceneSpec
    objects: tuple[SceneObject, ...]
    background: tuple[Rgb, ...]
    gradient_angle: float


_RADIUS_ALONE = {"small": (0.11, 0.13), None: (0.17, 0.21), "large": (0.26, 0.33)}
_RADIUS_PAIR = {"small": (0.10, 0.12), None: (0.145, 0.17), "large": (0.20, 0.23)}
_MARGIN = 0.02  # between an object and the canvas
_GAP = 0.025  # between two objects
_CENTRE_GAP = 0.30  # between two centres, along the relation
_OFF_AXIS = 0.12  # at most, across it
_MAX_ROTATION = {"square": 8.0, "diamond": 10.0}  # the others: 15


def layout(spec: SceneSpec, rng: np.random.Generator) -> Scene:
    """All that varies from picture to picture of one caption: places, radii, rotations, shades, textures."""
    ranges = _RADIUS_ALONE if len(spec.objects) == 1 else _RADIUS_PAIR
    radii = [rng.uniform(*ranges[o.size]) for o in spec.objects]
    shades = [_shade(rng, o.color) for o in spec.objects]
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
        accent=_accent(rng, shade, spec.color) if spec.texture else None,
        line_width=rng.uniform(0.32, 0.42) + wide if spec.shape == "ring" else rng.uniform(0.46, 0.62) + wide,
        period=max(coarse, radius * rng.uniform(0.50, 0.62)),
        texture_angle=rng.uniform(0, 180),
    )


def _place(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return rng.uniform(low, high), rng.uniform(low, high)


def _place_pair(rng: np.random.Generator, radii: list[float], relation: str) -> list[tuple[float, float]]:
    """Centres of two objects: clearly apart along the relation, close across it, never touching."""
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


# ---------------------------------------------------------------------------------------------- drawing

_OVERSAMPLING = 4
_RIM = 0.07  # of the radius: what a texture leaves free along the edge, so that the outline stays readable
_RIM_RING = 0.04  # two edges, little between them

Points = np.ndarray  # [n, 2] float, in radii around the centre, y down


def _on_circle(n: int, radius: float = 1.0, start: float = -90.0) -> Points:
    """n points evenly round a circle, clockwise from `start`; -90 is the top."""
    angles = np.radians(start) + 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


@lru_cache
def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([x, y - (y.max() + y.min()) / 2], axis=1)
    return points / np.linalg.norm(points, axis=1).max()


def _star() -> Points:
    outer, inner = _on_circle(5), _on_circle(5, radius=0.45, start=-54.0)
    return np.stack([outer, inner], axis=1).reshape(-1, 2)


def _cross(line_width: float) -> Points:
    w = line_width / 2
    a = math.sqrt(1 - w * w)  # the arms' corners lie on the unit circle
    quarter = np.array([(-w, -w), (-w, -a), (w, -a)])
    return np.concatenate([_turned(quarter, 90.0 * k) for k in range(4)])


def _outline(obj: SceneObject) -> Points:
    """The shape upright. All lie within the unit circle but the square, whose corners reach 1.2: at the small
    angles that it turns, it stays inside the circle's box too."""
    match obj.spec.shape:
        case "circle" | "ring":
            return _on_circle(60)
        case "square":
            return 0.85 * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
        case "triangle":
            return _on_circle(3)
        case "star":
            return _star()
        case "heart":
            return _heart()
        case "cross":
            return _cross(obj.line_width)
        case _:
            return np.array([(0.0, -1.0), (0.74, 0.0), (0.0, 1.0), (-0.74, 0.0)])


def _turned(points: Points, degrees: float) -> Points:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]])


def _dots(obj: SceneObject) -> Points:
    """Centres of the dots: in the middle of a ring's band or of a cross's arms, else on a square lattice."""
    spacing = obj.period / obj.radius
    if obj.spec.shape == "ring":
        middle = 1 - obj.line_width / 2
        return _on_circle(round(2 * math.pi * middle / spacing), radius=middle, start=obj.texture_angle)
    steps = np.arange(-4, 5) * spacing
    if obj.spec.shape == "cross":
        steps, zeros = steps[np.abs(steps) < 0.95], np.zeros_like(steps[np.abs(steps) < 0.95])
        arms = np.concatenate([np.stack([steps, zeros], axis=1), np.stack([zeros, steps], axis=1)])
        return _turned(arms, obj.rotation)
    lattice = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    return _turned(lattice, obj.texture_angle)


class _Canvas:
    """The pixels around one object, and its masks drawn oversampled. Points are in radii round the centre."""

    def __init__(self, obj: SceneObject, resolution: int) -> None:
        centre = np.array([obj.x, obj.y]) * resolution
        reach = 1.25 * obj.radius * resolution
        self.corner = tuple(int(c) for c in np.floor(centre - reach))
        side = math.ceil(2 * reach) + 2
        self.size = (side, side)
        self.scale = obj.radius * resolution * _OVERSAMPLING
        self.origin = (centre - self.corner) * _OVERSAMPLING
        self.mask = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
        self.draw = ImageDraw.Draw(self.mask)

    def polygon(self, points: Points, fill: int = 255) -> None:
        self.draw.polygon((points * self.scale + self.origin).ravel().tolist(), fill=fill)

    def erase_along(self, points: Points, rim: float) -> None:
        closed = np.concatenate([points, points[:2]]) * self.scale + self.origin
        self.draw.line(closed.ravel().tolist(), fill=0, width=round(2 * rim * self.scale), joint="curve")

    def disc(self, centre: Points, radius: float) -> None:
        x, y = centre * self.scale + self.origin
        r = radius * self.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=255)

    def coverage(self) -> Image.Image:
        """The mask at the picture's resolution: 0 outside, 255 inside, between them along the edge."""
        return self.mask.reduce(_OVERSAMPLING)


def _draw_texture(canvas: _Canvas, obj: SceneObject) -> None:
    spacing = obj.period / obj.radius
    if obj.spec.texture == "dotted":
        for centre in _dots(obj):
            canvas.disc(centre, 0.30 * spacing)
        return
    thickness = 0.45 * spacing
    for k in range(-4, 5):
        left, right = k * spacing - thickness / 2, k * spacing + thickness / 2
        stripe = np.array([(left, -1.3), (right, -1.3), (right, 1.3), (left, 1.3)])
        canvas.polygon(_turned(stripe, obj.texture_angle))


def _draw_object(picture: Image.Image, obj: SceneObject) -> None:
    resolution = picture.width
    outline = _Canvas(obj, resolution)
    points = _turned(_outline(obj), obj.rotation)
    edges = [points, points * (1 - obj.line_width)] if obj.spec.shape == "ring" else [points]
    for edge, fill in zip(edges, (255, 0), strict=False):
        outline.polygon(edge, fill)
    paint = Image.new("RGB", outline.size, _bytes(obj.color))
    if obj.accent is not None:
        texture = _Canvas(obj, resolution)
        _draw_texture(texture, obj)
        for edge in edges:
            texture.erase_along(edge, _RIM_RING if obj.spec.shape == "ring" else _RIM)
        paint.paste(_bytes(obj.accent), (0, 0), texture.coverage())
    picture.paste(paint, outline.corner, outline.coverage())


def _bytes(color: Rgb) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in color)


def _gradient(scene: Scene, resolution: int) -> Image.Image:
    start, end = (np.array(c, dtype=np.float32) for c in scene.background)
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5
    cos, sin = math.cos(math.radians(scene.gradient_angle)), math.sin(math.radians(scene.gradient_angle))
    along = (cos * axis[None, :] + sin * axis[:, None]) / (abs(cos) + abs(sin)) + 0.5  # [H, W] in [0, 1]
    pixels = start + along[..., None] * (end - start)
    return Image.fromarray((255 * pixels + 0.5).astype(np.uint8))


def render(scene: Scene, resolution: int = 128) -> Image.Image:
    """The picture: RGB, resolution x resolution, anti-aliased. The same scene gives the same pixels."""
    if resolution < 16:
        raise ValueError(f"resolution {resolution} is too small to show a shape: use at least 16")
    if len(scene.background) == 2:
        picture = _gradient(scene, resolution)
    else:
        picture = Image.new("RGB", (resolution, resolution), _bytes(scene.background[0]))
    for obj in scene.objects:
        _draw_object(picture, obj)
    return picture


# ---------------------------------------------------------------------------------------------- data set


class ShapesDataset(Dataset):
    """`size` captioned pictures; item i depends on (seed, split, i) alone, not on size or order of access.

    Items: {"image": float32 [resolution, resolution, 3] in [-1, 1], "caption": str}.
    """

    def __init__(self, size: int, split: str = "train", resolution: int = 128, seed: int = 0) -> None:
        _require(split, SPLITS, "split")
        if size < 1 or seed < 0:
            raise ValueError(f"size {size} must be at least 1 and seed {seed} at least 0")
        self.size = size
        self.split = split
        self.resolution = resolution
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of a data set of {self.size}")
        return np.random.default_rng([self.seed, SPLITS.index(self.split), int(index), stream])

    def spec(self, index: int) -> SceneSpec:
        """What the caption of item `index` says."""
        return sample_spec(self._rng(index, 0), self.split)

    def scene(self, index: int) -> Scene:
        """Item `index` in full: the ground truth for a detector."""
        return layout(self.spec(index), self._rng(index, 1))

    def picture(self, index: int) -> Image.Image:
        """Item `index` as a PIL image."""
        return render(self.scene(index), self.resolution)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        scene = self.scene(index)
        pixels = np.asarray(render(scene, self.resolution), dtype=np.float32)
        return {"image": torch.from_numpy(pixels / 127.5 - 1.0), "caption": caption(scene.spec)}
