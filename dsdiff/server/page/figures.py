"""Pieces of HTML for the page: progress with a preview, and pictures with what they cost."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dsdiff.server.job import Job
from dsdiff.server.pictures import png_base64
from dsdiff.server.previews import LatentColors

PREVIEW_SIDE = 256  # pixels
STYLE = """
.dsdiff-figures { display: flex; flex-wrap: wrap; gap: 16px; }
.dsdiff-figures figure { margin: 0; width: 256px; }
.dsdiff-figures img, .dsdiff-progress img { width: 100%; border-radius: 6px; }
.dsdiff-figures figcaption { line-height: 1.5; margin-top: 4px; font-variant-numeric: tabular-nums; }
.dsdiff-progress { max-width: 256px; }
.dsdiff-progress progress { width: 100%; }
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture of a comparison. seconds, memory: what it cost. psnr: to the first one, in dB; None for the first."""

    title: str
    image: Image.Image
    seconds: float
    memory: int
    psnr: float | None

    @property
    def cost(self) -> str:
        """The cost and the PSNR in a line."""
        return f"{self.seconds:.2f} s · {self.memory / 1e9:.2f} GB · {psnr_text(self.psnr)}"


def psnr_text(psnr: float | None) -> str:
    """Return a PSNR in words."""
    if psnr is None:
        return "the first"
    return "the same picture" if math.isinf(psnr) else f"PSNR {psnr:.1f} dB"


def image_html(image: Image.Image, text: str) -> str:
    """Return an <img> that holds its picture. text: what it shows."""
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{png_base64(image)}">'


def progress_html(job: Job, colors: LatentColors | None, waiting: int) -> str:
    """Return how far a job is, with a preview of its picture. colors: None for no preview."""
    if job.started is None:
        return f'<div class="dsdiff-progress">waiting in line, of {waiting}</div>'
    latents = job.latents
    if latents is None:
        return '<div class="dsdiff-progress">reading the model</div>'
    step = f"step {job.step} of {job.steps}" + (f", batch {job.walk + 1} of {job.walks}" if job.walks > 1 else "")
    preview = "" if colors is None else image_html(colors.picture(latents, PREVIEW_SIDE), "preview")
    return (
        f'<div class="dsdiff-progress"><progress value="{job.progress:.3f}"></progress>'
        f"{step}, {job.seconds_left:.0f} s left{preview}</div>"
    )


def figures_html(figures: Sequence[Figure], note: str = "") -> str:
    """Return figures side by side, and a note below."""
    shown = "".join(
        f"<figure>{image_html(each.image, each.title)}<figcaption><b>{html.escape(each.title)}</b><br>"
        f"{html.escape(each.cost)}</figcaption></figure>"
        for each in figures
    )
    return f'<div class="dsdiff-figures">{shown}</div><p>{html.escape(note)}</p>'
