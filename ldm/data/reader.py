"""A small detector of the objects in pictures of the shapes data set: colour, shape, size, texture, place.

It measures whether generated pictures show what their captions ask for (`read`, then `judge`). Its pooled features
replace Inception's in a Frechet distance on this data set (`features`). It is a CenterNet (Zhou et al. 2019, "Objects
as Points"): each cell of a grid predicts how near it is to an object's centre, and what that object is.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.shapes import COLORS, SHAPES, SIZES, TEXTURES, ObjectSpec, Scene, SceneSpec, ShapesDataset, render
from ldm.tensor_files import check_whole

STRIDE = 8  # pixels of a grid cell
READING_SIDE = 128  # pixels of the pictures that the reader learnt from
LOSS_WEIGHTS = {"texture": 4.0}  # the others: 1. Stripes and dots take by far the longest to learn
CLASSES = {"shape": SHAPES, "color": COLORS, "size": (None, *SIZES), "texture": (None, *TEXTURES)}


@dataclass(frozen=True, kw_only=True)
class SeenObject:
    """An object found in a picture.

    size, texture: None for medium and plain. x, y: centre, in fractions of the picture's width and height.
    score: confidence in (0, 1) that there is an object.
    """

    shape: str
    color: str
    size: str | None
    texture: str | None
    x: float
    y: float
    score: float


# --------------------------------------------------------------------------------------------- training data


def augment(picture: Image.Image, rng: np.random.Generator) -> Tensor:
    """Return a picture as float32 [3, H, W] in [-1, 1], degraded like a decoded latent: blur, noise, other colours."""
    if rng.random() < 0.3:
        width, height = (round(side * rng.uniform(0.5, 0.9)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR).resize(
            picture.size, Image.Resampling.BICUBIC
        )
    if rng.random() < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    gain, offset = rng.uniform(0.92, 1.08) + rng.uniform(-0.03, 0.03, 3), rng.uniform(-0.05, 0.05, 3)
    pixels = pixels * gain.astype(np.float32) + offset.astype(np.float32)
    if rng.random() < 0.7:
        noise = rng.standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + rng.uniform(0.0, 0.08) * noise
    return torch.from_numpy(pixels.clip(-1.0, 1.0)).permute(2, 0, 1).contiguous()


def dense_targets(scene: Scene, side: int) -> dict[str, Tensor]:
    """Return what each cell of a side x side grid should predict for `scene`.

    heat: float [side, side], 1 in the cell of a centre, and a Gaussian around it.
    shape, color, size, texture: int64 [side, side], the class of the nearest object.
    offset: float [2, side, side], from the cell's middle to that object's centre (x, y), in cells.
    """
    middle = torch.arange(side) + 0.5
    centres = torch.tensor([(o.x, o.y) for o in scene.objects]) * side
    offsets = torch.stack(
        [torch.stack([cx - middle.expand(side, side), cy - middle[:, None].expand(side, side)]) for cx, cy in centres]
    )  # [objects, 2, side, side]
    nearest = offsets.square().sum(1).argmin(0)  # [side, side]
    # Distances are measured from the cell that holds the centre, so that one cell always has heat 1.
    cells = centres.floor() + 0.5 - centres
    heat = torch.exp(-(offsets + cells[:, :, None, None]).square().sum(1) / 1.5).amax(0)
    targets = {"heat": heat, "offset": torch.stack([offsets[:, axis].gather(0, nearest[None])[0] for axis in (0, 1)])}
    for name, values in CLASSES.items():
        targets[name] = torch.tensor([values.index(getattr(o.spec, name)) for o in scene.objects])[nearest]
    return targets


class ReaderDataset(Dataset):
    """Augmented pictures with dense targets. Item i depends on (seed, i) alone.

    Every fifth picture has a combination that the split "train" lacks, so that the reader does not share the
    generator's blind spots. Items: {"image": float32 [3, resolution, resolution] in [-1, 1]} and `dense_targets`.
    """

    def __init__(self, size: int, resolution: int = 128, seed: int = 1000) -> None:
        if resolution < STRIDE or resolution % STRIDE:
            raise ValueError(f"resolution {resolution} must be a multiple of {STRIDE}")
        self.resolution = resolution
        self.seed = seed
        self.sources = [ShapesDataset(size, split, resolution, seed) for split in ("train", "heldout")]

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self.sources[index % 5 == 4].scene(index)
        picture = render(scene, self.resolution)
        image = augment(picture, np.random.default_rng([self.seed, int(index)]))
        return {"image": image, **dense_targets(scene, self.resolution // STRIDE)}


# ------------------------------------------------------------------------------------------------- network


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class _ResidualBlock(nn.Module):
    """A convolution added to its input."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = _conv(width, width, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class _PictureContext(nn.Module):
    """Add a summary of the whole picture to every cell, because "large" depends on the number of objects."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return x + self.project(summary)[:, :, None, None]


def reader_trunk(width: int = 64, features: int = 128) -> nn.Sequential:
    """Return the trunk of the reader: [B, 3, H, W] in [-1, 1] -> [B, features, H/8, W/8]."""
    return nn.Sequential(
        _conv(3, 24, stride=2),
        _conv(24, 48, stride=2),
        _ResidualBlock(48, 1),  # here a period of stripes or dots is two or three cells
        _conv(48, width, stride=2),
        _ResidualBlock(width, 1),
        _PictureContext(width),
        _ResidualBlock(width, 2),
        _ResidualBlock(width, 1),
        nn.Conv2d(width, features, 1),
        nn.ReLU(),
    )


def at_reading_size(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] so that the shorter side has less than 256 pixels, by averaging.

    The reader knows objects of the size that they have in pictures of 128 x 128, so it sees larger ones reduced: sides
    are divided by the shorter side's whole multiple of 128, and rounded to multiples of 8.
    """
    factor = min(images.shape[2:]) // READING_SIDE
    if factor < 2:
        return images
    height, width = (max(1, round(side / factor / STRIDE)) * STRIDE for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width))


class ShapesReader(nn.Module):
    """Detector of shapes, fully convolutional, trained at 128 x 128 pixels; it sees larger pictures reduced.

    width: channels of the trunk. features: channels of the last layer before the heads.
    """

    def __init__(self, width: int = 64, features: int = 128) -> None:
        super().__init__()
        self.trunk = reader_trunk(width, features)
        self.parts = {"heat": 1, "offset": 2, **{name: len(values) for name, values in CLASSES.items()}}
        self.head = nn.Conv2d(features, sum(self.parts.values()), 1)
        assert self.head.bias is not None
        self.head.bias.data[0] = -4.0  # few cells hold a centre

    @classmethod
    def from_file(cls, path: str | Path, **params: int) -> "ShapesReader":
        """Return a reader in eval mode with the weights of a safetensors file, as float32.

        params: the arguments of the constructor. Raises ValueError for a file that does not hold such a reader.
        """
        reader = cls(**params)
        try:
            check_whole(path)
            reader.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} does not hold the weights of this reader ({reason}): train it anew") from error
        return reader.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of each part [B, classes, H/8, W/8] for images [B, 3, H, W] in [-1, 1]; offset in cells."""
        maps = self.head(self._trunk(images))
        return dict(zip(self.parts, maps.split(list(self.parts.values()), dim=1), strict=True))

    def _trunk(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"expected images [B, 3, H, W] with H, W multiples of {STRIDE}: {[*images.shape]}")
        return self.trunk(images.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the trunk's output, averaged over the picture, [B, features] for images [B, 3, H, W] in [-1, 1]."""
        return self._trunk(at_reading_size(images)).mean((2, 3))

    @torch.no_grad()
    def read(self, images: Tensor, threshold: float = 0.4) -> list[list[SeenObject]]:
        """Return the objects of each picture, best score first.

        images: [B, 3, H, W] in [-1, 1], of any size. threshold: least score of an object, in (0, 1).
        """
        maps = {name: part.float().cpu() for name, part in self(at_reading_size(images)).items()}
        heat = maps["heat"].sigmoid()
        peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > threshold)
        seen = [[] for _ in range(len(heat))]
        for b, _, row, column in peaks.nonzero().tolist():
            seen[b].append(self._object_at(maps, heat, b, row, column))
        return [_suppress(objects) for objects in seen]

    @staticmethod
    def _object_at(maps: dict[str, Tensor], heat: Tensor, b: int, row: int, column: int) -> SeenObject:
        classes = {name: values[maps[name][b, :, row, column].argmax()] for name, values in CLASSES.items()}
        dx, dy = maps["offset"][b, :, row, column].tolist()
        height, width = heat.shape[2:]
        score = heat[b, 0, row, column].item()
        return SeenObject(**classes, x=(column + 0.5 + dx) / width, y=(row + 0.5 + dy) / height, score=score)


def reader_losses(maps: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss of each part, a scalar.

    The loss of the heat is the penalty-reduced focal loss of CornerNet (Law and Deng 2018, eq. 1). The other parts are
    averaged over the cells around a centre, weighted by their heat.
    """
    heat, logits = targets["heat"], maps["heat"][:, 0].float()
    p, centre = logits.sigmoid(), heat == 1
    hit = -F.logsigmoid(logits) * (1 - p) ** 2
    miss = -F.logsigmoid(-logits) * p**2 * (1 - heat) ** 4
    losses = {"heat": torch.where(centre, hit, miss).sum() / centre.sum()}
    weight = torch.where(heat > 0.25, heat, 0.0)
    weight = weight / weight.sum()
    for name in CLASSES:
        loss = (F.cross_entropy(maps[name].float(), targets[name], reduction="none") * weight).sum()
        losses[name] = LOSS_WEIGHTS.get(name, 1.0) * loss
    distance = F.smooth_l1_loss(maps["offset"].float(), targets["offset"], reduction="none").sum(1)
    return losses | {"offset": (distance * weight).sum()}


def _suppress(objects: list[SeenObject], distance: float = 0.14) -> list[SeenObject]:
    """Keep the best of objects whose centres are closer than `distance` (non-maximum suppression)."""
    kept: list[SeenObject] = []
    for new in sorted(objects, key=lambda o: -o.score):
        if all(math.hypot(new.x - old.x, new.y - old.y) >= distance for old in kept):
            kept.append(new)
    return kept


# --------------------------------------------------------------------------------------------- judgement


def judge(spec: SceneSpec, seen: Sequence[SeenObject]) -> dict[str, bool]:
    """Return which of the demands of `spec` the objects `seen` meet.

    Keys: "color 1", "shape 1", and if mentioned "size 1", "texture 1"; the same with 2 for a second object; "count"
    (as many objects as asked for), and with two objects "relation". Each asked object is matched to a seen one so that
    most colours and shapes agree. All demands on an object without a match count as not met.
    """
    matched = _match(spec.objects, seen)
    verdict = {}
    for n, (asked, found) in enumerate(zip(spec.objects, matched, strict=True), start=1):
        for name in CLASSES:
            wanted = getattr(asked, name)
            if wanted is not None:
                verdict[f"{name} {n}"] = found is not None and getattr(found, name) == wanted
    verdict["count"] = len(seen) == len(spec.objects)
    if spec.relation is not None:
        found = [one for one in matched if one is not None]
        verdict["relation"] = len(found) == 2 and relation_holds(spec.relation, *found)
    return verdict


def relation_holds(relation: str, first: SeenObject, second: SeenObject) -> bool:
    """Tell whether `first` is in `relation` to `second`: by at least 0.1, and further along its axis than across."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > max(0.1, abs(across))


def _match(asked: Sequence[ObjectSpec], seen: Sequence[SeenObject]) -> tuple[SeenObject | None, ...]:
    """Return the seen object of each asked one, or None. Among equally good matches, the surest objects win."""
    candidates = [*sorted(seen, key=lambda o: -o.score)[:5], *[None] * len(asked)]

    def agreement(assignment: tuple[SeenObject | None, ...]) -> tuple[int, int]:
        pairs = [(a, s) for a, s in zip(asked, assignment, strict=True) if s is not None]
        return sum((a.shape == s.shape) + (a.color == s.color) for a, s in pairs), len(pairs)

    return max(itertools.permutations(candidates, len(asked)), key=agreement)
