"""Previews: a linear map from latents to colours, which costs next to nothing.

Pictures are made by NumPy, in whichever thread asks: see `dsdiff.server.studio`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dsdiff.pipeline import Pipeline

PATCHES, PATCH_SIDE, SAMPLES = 8, 16, 4  # patches of one colour along a side, their pixels, and pictures of them


class LatentColors:
    """The affine map of each latent to one colour that fits a model's encoder best, by least squares.

    weights: [C + 1, 3], the last row is the constant. factor: pixels per latent along a side.
    """

    def __init__(self, weights: np.ndarray, factor: int):
        self.weights, self.factor = weights, factor

    @classmethod
    def of(cls, pipeline: Pipeline) -> "LatentColors":
        """Return the map of a pipeline's model, from what its encoder makes of random patches of colour."""
        generator = torch.Generator().manual_seed(0)
        colors = torch.rand(SAMPLES, 3, PATCHES, PATCHES, generator=generator)
        images = F.interpolate(colors, scale_factor=PATCH_SIDE, mode="nearest")
        latents = torch.cat([pipeline.encode(image[None]) for image in images]).float().cpu()
        rows = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).permute(0, 2, 3, 1).flatten(0, 2)
        targets = F.avg_pool2d(images, pipeline.spec.factor).permute(0, 2, 3, 1).flatten(0, 2)
        return cls(torch.linalg.lstsq(rows, targets).solution.numpy(), pipeline.spec.factor)

    def picture(self, latents: np.ndarray, side: int | None = None) -> Image.Image:
        """Return the picture of latents [C, h, w], at the size that they decode to, or at `side` for the longer one."""
        colors = np.einsum("chw,cr->hwr", latents, self.weights[:-1]) + self.weights[-1]
        small = Image.fromarray((colors.clip(0, 1) * 255).round().astype(np.uint8))
        width, height = (pixels * self.factor for pixels in small.size)
        scale = 1.0 if side is None else side / max(width, height)
        return small.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
