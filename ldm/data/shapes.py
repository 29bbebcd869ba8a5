"""Captioned procedural pictures of one or two coloured shapes: training set, FID reference and test data.

Three levels, each a plain function of the one before and, where it varies, of a random generator:

    SceneSpec  what the caption says       caption(spec), parse_caption(text), sample_spec(rng, split)
    Scene      where and how it is drawn   layout(spec, rng)
    picture    PIL image                   render(scene, resolution)

`ldm.data.captions` has the first level and `ldm.data.scenes` the second; their names are here too. Lengths are
fractions of the picture's width, x runs right, y runs down, angles are in degrees.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from ldm.data import captions, palette, scenes
from ldm.data.captions import (
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_RELATION,
    HELD_OUT_TEXTURE_SHAPE,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    ObjectSpec,
    SceneSpec,
    caption,
    held_out,
    parse_caption,
    require,
    sample_spec,
)
from ldm.data.palette import COLORS, Rgb
from ldm.data.scenes import Scene, SceneObject, layout
from ldm.fileio import file_sha256

__all__ = [
    "COLORS",
    "HELD_OUT_COLOR_SHAPE",
    "HELD_OUT_RELATION",
    "HELD_OUT_TEXTURE_SHAPE",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TEXTURES",
    "ObjectSpec",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "ShapesDataset",
    "caption",
    "code_sha256",
    "held_out",
    "layout",
    "parse_caption",
    "render",
    "sample_spec",
]


def code_sha256() -> str:
    """Return a hash of the code that decides what the pictures show, for caches that depend on it."""
    files = (palette.__file__, captions.__file__, scenes.__file__, __file__)
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- drawing

_OVERSAMPLING = 4
# A texture leaves a rim along the edge free, so that the outline stays readable. Fractions of the radius.
_RIM = 0.07
_RIM_RING = 0.04  # a ring has two edges and little room between them

Points = np.ndarray  # [n, 2] float, in radii around the centre, y down


def _on_circle(n: int, radius: float = 1.0, start: float = -90.0) -> Points:
    """Return n points evenly spaced on a circle, clockwise from `start` in degrees; -90 is the top."""
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
    """Return the corners of a shape that stands upright.

    All shapes are inside the unit circle, except the square, whose corners are at 1.2. At the small angles by which it
    is turned, it stays inside the circle's bounding box.
    """
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
    """Return the centres of the dots: along a ring's band or a cross's arms, else on a square lattice."""
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
    """The pixels around one object, and a mask drawn at a higher resolution. Points are in radii from the centre."""

    def __init__(self, obj: SceneObject, resolution: int) -> None:
        centre = np.array([obj.x, obj.y]) * resolution
        reach = 1.25 * obj.radius * resolution
        left, top = np.floor(centre - reach)
        self.corner = (int(left), int(top))
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
        """Return the mask at the picture's resolution: 0 outside, 255 inside, values between along the edge."""
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
    red, green, blue = (round(255 * c) for c in color)
    return red, green, blue


def _gradient(scene: Scene, resolution: int) -> Image.Image:
    start, end = (np.array(c, dtype=np.float32) for c in scene.background)
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5
    cos, sin = math.cos(math.radians(scene.gradient_angle)), math.sin(math.radians(scene.gradient_angle))
    along = (cos * axis[None, :] + sin * axis[:, None]) / (abs(cos) + abs(sin)) + 0.5  # [H, W] in [0, 1]
    pixels = start + along[..., None] * (end - start)
    return Image.fromarray((255 * pixels + 0.5).astype(np.uint8))


def render(scene: Scene, resolution: int = 128) -> Image.Image:
    """Return the picture of a scene, RGB, resolution x resolution, anti-aliased. Equal scenes give equal pixels.

    Raises ValueError for a resolution of less than 16.
    """
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
    """`size` captioned pictures. Item i depends on (seed, split, i) alone, not on the size or the order of access.

    Items: {"image": float32 [resolution, resolution, 3] in [-1, 1], "caption": str}. Raises ValueError for an unknown
    split, a size of less than 1 or a negative seed.
    """

    def __init__(self, size: int, split: str = "train", resolution: int = 128, seed: int = 0) -> None:
        require(split, SPLITS, "split")
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
        """Return the content of the caption of item `index`."""
        return sample_spec(self._rng(index, 0), self.split)

    def scene(self, index: int) -> Scene:
        """Return item `index` with the places of its objects: the ground truth for a detector."""
        return layout(self.spec(index), self._rng(index, 1))

    def picture(self, index: int) -> Image.Image:
        """Return item `index` as a PIL image."""
        return render(self.scene(index), self.resolution)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        scene = self.scene(index)
        pixels = np.asarray(render(scene, self.resolution), dtype=np.float32)
        return {"image": torch.from_numpy(pixels / 127.5 - 1.0), "caption": caption(scene.spec)}
