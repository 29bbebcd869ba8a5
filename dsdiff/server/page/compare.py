"""The tab that draws one prompt and seed at several bits, ratios and steps, with the cost under each picture."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from dsdiff.metrics.pair_scores import psnr
from dsdiff.server.job import Job
from dsdiff.server.page.fields import sampler_choice, whole_number
from dsdiff.server.page.figures import Figure, figures_html
from dsdiff.server.page.forms import Form, Variant, defaults, variants
from dsdiff.server.page.jobs import HIDDEN, following, interrupt, put_in_line, result_of
from dsdiff.server.requests import Drawing
from dsdiff.server.studio import Studio

NOTE = (
    "Seconds are of drawing, the decoder included, after a first picture of one step that is not counted; reading the "
    "model is not. Memory is the most that was the server's own, the model included. PSNR is to the first picture."
)


class CompareTab:
    """The tab. It is built where it is made, inside gradio's blocks."""

    def __init__(self, studio: Studio):
        self.studio = studio
        titles = list(studio.shelf.entries)
        steps, scale, width, height = defaults(studio.shelf.first.spec, studio.limits.side)
        prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
        with gr.Row():
            self.models = gr.Dropdown(
                titles, value=titles[:3], multiselect=True, label="Models and bits", elem_id="models"
            )
            self.ratios = gr.Textbox("0, 0.5", label="Ratios of merged tokens", elem_id="ratios")
            self.counts = gr.Textbox(str(steps), label="Steps", elem_id="counts")
        with gr.Row():
            self.common = {
                "prompt": prompt,
                "sampler": sampler_choice(),
                "scale": gr.Slider(0, 20, scale, step=0.1, label="Guidance scale"),
                "seed": whole_number("Seed", 42, minimum=0),
                "width": whole_number("Width", width, maximum=studio.limits.side),
                "height": whole_number("Height", height, maximum=studio.limits.side),
            }
        with gr.Row():
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            stop = gr.Button("Stop", elem_id="compare-stop")
        self.progress, self.result = gr.HTML(elem_id="compare-progress"), gr.HTML(elem_id="comparison")
        self.job = gr.State(None)
        inputs = {self.models, self.ratios, self.counts, *self.common.values()}
        start.click(self.compare, inputs, [self.progress, self.result, self.job], api_visibility=HIDDEN)
        stop.click(interrupt, self.job, None, queue=False, api_visibility=HIDDEN)

    def compare(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Draw all variants, and show each with its cost as soon as it is there."""
        try:
            chosen = variants(values[self.models], values[self.ratios], values[self.counts])
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        common = {name: values[field] for name, field in self.common.items()}
        figures: list[Figure] = []
        for variant, job, is_counted in _jobs(self.studio, common, chosen):
            yield {self.job: job}
            for far in following(self.studio, job, previews=False):  # they would cost time that is measured
                yield {self.progress: f"{len(figures) + 1} of {len(chosen)}: {variant.title}{far}"}
            drawing = result_of(job)
            if drawing.interrupted:
                break
            if is_counted:
                figures.append(_figure(variant, drawing, figures))
                yield {self.result: figures_html(figures, NOTE)}
        yield {self.progress: "" if len(figures) == len(chosen) else "stopped"}


def _jobs(studio: Studio, common: dict[str, Any], chosen: Sequence[Variant]) -> Iterator[tuple[Variant, Job, bool]]:
    """Put one job after the other in line, and yield each with its variant, and True if it counts.

    The first one of a model and ratio, of a single step, does not: it makes what is made at first use.
    """
    before: Variant | None = None
    for variant in chosen:
        form = Form(model=variant.model, ratio=variant.ratio, steps=variant.steps, **common)
        if before is None or (before.model, before.ratio) != (variant.model, variant.ratio):
            yield variant, put_in_line(studio, replace(form, steps=1)), False
        yield variant, put_in_line(studio, form), True
        before = variant


def _figure(variant: Variant, drawing: Drawing, before: Sequence[Figure]) -> Figure:
    image = drawing.pictures[0].image
    score = _psnr(before[0].image, image) if before else None
    return Figure(title=variant.title, image=image, seconds=drawing.seconds, memory=drawing.memory, psnr=score)


def _psnr(first: Image.Image, second: Image.Image) -> float:
    """Return the PSNR of two pictures of a size, in dB. It is NumPy's work, see `dsdiff.server.studio`."""
    a, b = (np.asarray(each, dtype=np.float64) / 255 for each in (first, second))
    return psnr(np.square(a - b).mean(keepdims=True))
