"""Scores that compare the pictures of a row with their prompts: CLIP score, and attributes that are right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dsdiff.metrics.attributes import answers
from dsdiff.metrics.clip_scores import build_shapes_clip
from dsdiff.metrics.intervals import wilson
from dsdiff.metrics.pair_scores import add_mean
from dsdiff.metrics.scores import Score, Scores
from dsdiff.models.registry import READER
from ldm.data.reader import ShapesReader


def add_shapes_scores(
    scores: Scores,
    paths: Sequence[Path],
    prompts: Sequence[str],
    *,
    device: torch.device,
    batch_size: int,
    resamples: int,
    seed: int,
) -> None:
    """Add the CLIP score by the embedded model's own CLIP, and the share of attributes that are right, in percent.

    paths: of the pictures; prompts: their captions. The share has Wilson's interval, the CLIP score one by a bootstrap
    over prompts with `resamples` and `seed`.
    """
    clip = build_shapes_clip(device)
    reader = ShapesReader.from_file(READER).to(device)
    values: list[torch.Tensor] = []
    told: list[bool] = []
    for start in tqdm(range(0, len(paths), batch_size), "prompt scores", unit="batch"):
        part = slice(start, start + batch_size)
        images = torch.stack([_read(path) for path in paths[part]])
        values.append(clip(images, prompts[part]))
        told += answers(images, prompts[part], reader)
    add_mean(scores, "shapes_clip_score", torch.cat(values).double().numpy(), prompts, resamples, seed)
    low, high = wilson(sum(told), len(told))
    scores.by_key["attributes"] = Score(
        name="attributes right, %",
        value=100 * sum(told) / len(told),
        n=len(told),
        better="higher",
        low=100 * low,
        high=100 * high,
    )


def _read(path: Path) -> torch.Tensor:
    """Return a picture as uint8 [3, H, W]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
