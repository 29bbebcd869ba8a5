"""Measure whether pictures of shapes show what their captions ask for; a small detector reads the pictures.

Every attribute that a caption asks for is judged right or wrong; what the caption leaves open is not judged.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from dsdiff.images.png import to_pictures, write_png
from dsdiff.metrics.intervals import wilson
from ldm.data.reader import ShapesReader, judge
from ldm.data.shapes import SceneSpec, caption, parse_caption
from ldm.fileio import write_atomically

ATTRIBUTES = ("color", "shape", "texture", "size", "count", "relation")
SHEET_PICTURES, SHEET_COLUMNS = 64, 8

Verdict = Mapping[str, bool]  # "color 1", "count" ... -> whether that is right
Source = Callable[[slice], Tensor]  # which captions -> their pictures, float32 [B, 3, H, W] in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Right answers out of n, with the percentage and its 95% interval."""

    right: int
    n: int
    percent: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, n: int) -> "Share":
        low, high = wilson(right, n)
        percent = round(100 * right / n, 2)
        return cls(right=right, n=n, percent=percent, low=round(100 * low, 2), high=round(100 * high, 2))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The captions of a split, the verdicts on their pictures by source, and the pictures of the first source."""

    split: str
    specs: Sequence[SceneSpec]
    verdicts: Mapping[str, Sequence[Verdict]]
    pictures: Sequence[Image.Image]

    def counts(self) -> dict[str, dict[str, Share]]:
        """Return the shares of right answers: source -> attribute -> share."""
        return {source: count(verdicts) for source, verdicts in self.verdicts.items()}

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return the same as plain values."""
        return {
            source: {attribute: asdict(share) for attribute, share in counts.items()}
            for source, counts in self.counts().items()
        }

    def table(self) -> str:
        """Return a line for each source, a column for each attribute: the percentage and its interval."""
        return table(self.split, self.counts())

    def write(self, outdir: Path) -> None:
        """Write sheet-SPLIT.png, pictures with their captions, and prompts-SPLIT.txt for txt2img's --from-file."""
        captions = [caption(spec) for spec in self.specs]
        shown = slice(0, SHEET_PICTURES)
        first = next(iter(self.verdicts.values()))
        write_png(outdir / f"sheet-{self.split}.png", sheet(self.pictures[shown], captions[shown], first[shown]))
        text = "\n".join(captions) + "\n"
        write_atomically(outdir / f"prompts-{self.split}.txt", lambda path: path.write_text(text, encoding="utf-8"))


# --- pictures ----------------------------------------------------------------------------------------------


def judge_folder(folder: Path, reader: ShapesReader, batch_size: int) -> Judged:
    """Judge the PNGs of a folder, as scripts/txt2img.py writes them. Raises ValueError as `read_folder` does."""
    specs, ready = read_folder(folder)
    return judge_sources("images", specs, {"images": lambda part: tensor_of(ready[part])}, reader, batch_size)


def read_folder(folder: Path) -> tuple[list[SceneSpec], list[Image.Image]]:
    """Return the captions and the pictures of the PNGs in `folder`.

    Raises ValueError if a PNG holds no prompt of the grammar, if sizes differ, or if there are none.
    """
    specs: list[SceneSpec] = []
    pictures: list[Image.Image] = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as file:
            if "prompt" not in file.info:
                raise ValueError(f"{str(path)!r} holds no prompt: pictures must come from scripts/txt2img.py")
            specs.append(parse_caption(str(file.info["prompt"])))
            pictures.append(file.convert("RGB"))
        if pictures[-1].size != pictures[0].size:
            raise ValueError(f"{str(path)!r} is {pictures[-1].size}, the first is {pictures[0].size}: use one size")
    if not pictures:
        raise ValueError(f"no PNG in {str(folder)!r}: give the samples folder of a txt2img run")
    return specs, pictures


def tensor_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures as float32 [B, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    return torch.from_numpy(pixels / 255).permute(0, 3, 1, 2)


# --- verdicts ----------------------------------------------------------------------------------------------


def judge_batch(images: Tensor, specs: Sequence[SceneSpec], reader: ShapesReader) -> list[Verdict]:
    """Return a verdict for each picture of float32 [B, 3, H, W] in [0, 1]."""
    device = next(reader.parameters()).device
    seen = reader.read(images.to(device) * 2 - 1)
    return [judge(spec, objects) for spec, objects in zip(specs, seen, strict=True)]


def answers(images: Tensor, captions: Sequence[str], reader: ShapesReader) -> list[bool]:
    """Tell for each attribute that the captions ask for if it is right. images: uint8 [B, 3, H, W]."""
    verdicts = judge_batch(images.float() / 255, [parse_caption(text) for text in captions], reader)
    return [right for verdict in verdicts for right in verdict.values()]


def judge_sources(
    split: str, specs: Sequence[SceneSpec], sources: Mapping[str, Source], reader: ShapesReader, batch_size: int
) -> Judged:
    """Return the verdicts on the pictures of each source."""
    verdicts: dict[str, list[Verdict]] = {name: [] for name in sources}
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(specs), batch_size), unit="batch"):
        part = slice(start, min(start + batch_size, len(specs)))
        batches = {name: images_of(part) for name, images_of in sources.items()}
        for name, images in batches.items():
            verdicts[name] += judge_batch(images, specs[part], reader)
        pictures += to_pictures(next(iter(batches.values())))
    return Judged(split=split, specs=specs, verdicts=verdicts, pictures=pictures)


def count(verdicts: Iterable[Verdict]) -> dict[str, Share]:
    """Return the shares of right answers by attribute, over all objects. What no caption asks for is absent."""
    answers: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, right in verdict.items():
            answers.setdefault(name.split()[0], []).append(right)
    return {name: Share.of(sum(answers[name]), len(answers[name])) for name in ATTRIBUTES if name in answers}


# --- what is shown -----------------------------------------------------------------------------------------


def table(split: str, rows: Mapping[str, Mapping[str, Share]]) -> str:
    """Return a line for each source, a column for each attribute: the percentage and its interval."""
    first = next(iter(rows.values()))
    titles = (f"{name} n={share.n}" for name, share in first.items())
    lines = [f"{split:<12}" + "".join(f"{title:>20}" for title in titles)]
    for source, shares in rows.items():
        cells = (f"{share.percent:.1f} [{share.low:.1f}, {share.high:.1f}]" for share in shares.values())
        lines.append(f"{source:<12}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], verdicts: Sequence[Verdict]) -> Image.Image:
    """Return the pictures in rows of eight, each over its caption and, in red, what is wrong."""
    side, text = pictures[0].width, 92
    rows = math.ceil(len(pictures) / SHEET_COLUMNS)
    page = Image.new("RGB", (SHEET_COLUMNS * (side + 8), rows * (side + text)), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, words, verdict) in enumerate(zip(pictures, captions, verdicts, strict=True)):
        x, y = i % SHEET_COLUMNS * (side + 8), i // SHEET_COLUMNS * (side + text)
        page.paste(picture, (x, y))
        draw.text((x + 2, y + side), "\n".join(textwrap.wrap(words, side // 6)), fill="black")
        wrong = ", ".join(name for name, right in verdict.items() if not right)
        draw.text((x + 2, y + side + text - 14), wrong[: side // 5], fill="red")
    return page
