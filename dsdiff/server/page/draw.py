"""The tab that draws: prompt and settings, progress with previews, and a gallery with settings to copy."""

import itertools
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from dsdiff.images.png import write_png
from dsdiff.options import VAES
from dsdiff.server.page.fields import sampler_choice, whole_number
from dsdiff.server.page.forms import AUTOMATIC, Form, defaults
from dsdiff.server.page.jobs import HIDDEN, following, interrupt, put_in_line, result_of
from dsdiff.server.requests import Drawing, Drawn
from dsdiff.server.studio import Studio

MOST_SHOWN = 60  # pictures in the gallery of a visit


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture in the gallery: its file, its caption, the text that other tools read, and the fields that made it.

    The file is deleted when nothing refers to this object any more: when later pictures took its place in the gallery,
    or when the visit has ended.
    """

    path: str
    caption: str
    text: str
    form: Form

    def __post_init__(self) -> None:
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)


class DrawTab:
    """The tab. It is built where it is made, inside gradio's blocks.

    folder: for the pictures that are shown; it is deleted when nothing refers to it.
    """

    def __init__(self, studio: Studio, folder: tempfile.TemporaryDirectory):
        self.studio, self.folder, self.numbers = studio, folder, itertools.count()
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                self.fields = _fields(studio)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=4, min_width=340):
                self.progress = gr.HTML(elem_id="progress")
                self.gallery = gr.Gallery(
                    label="Pictures",
                    columns=3,
                    fit_columns=False,
                    height=440,
                    object_fit="contain",
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                self.text = gr.Textbox(
                    label="Settings of the picture", lines=3, buttons=["copy"], elem_id="settings", interactive=False
                )
                again = gr.Button("Fill in the settings of the picture", elem_id="again")
        self.shown, self.chosen, self.job = gr.State([]), gr.State(0), gr.State(None)
        self._wire(start, stop, again)

    def _wire(self, start: gr.Button, stop: gr.Button, again: gr.Button) -> None:
        fields = self.fields
        inputs = {*fields.values(), self.shown}
        outputs = [self.shown, self.chosen, self.job, self.gallery, self.text, self.progress]
        gr.on([start.click, fields["prompt"].submit], self.draw, inputs, outputs, api_visibility=HIDDEN)
        stop.click(interrupt, self.job, None, queue=False, api_visibility=HIDDEN)
        self.gallery.select(self.choose, self.shown, [self.chosen, self.text], api_visibility=HIDDEN)
        again.click(self.fill_in, [self.shown, self.chosen], [*fields.values()], api_visibility=HIDDEN)
        of_models = [fields[name] for name in ("steps", "scale", "width", "height")]
        fields["model"].input(self.fill_in_defaults, fields["model"], of_models, api_visibility=HIDDEN)

    def draw(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Draw what the fields ask for; show progress, then the pictures before those of earlier."""
        form = Form(**{name: values[field] for name, field in self.fields.items()})
        job = put_in_line(self.studio, form)
        yield {self.job: job}
        for far in following(self.studio, job):
            yield {self.progress: far}
        drawing = result_of(job)
        new = [self._show(drawing, picture, form) for picture in drawing.pictures]
        every = [*reversed(new), *values[self.shown]][:MOST_SHOWN]
        yield {
            self.shown: every,
            self.chosen: 0,
            self.gallery: gr.Gallery(value=[(each.path, each.caption) for each in every], selected_index=None),
            self.text: every[0].text if every else "",
            self.progress: _summary(drawing),
        }

    def choose(self, every: list[Shown], event: gr.SelectData) -> tuple[int, str]:
        """Show the settings of the picture that was clicked."""
        return event.index, every[event.index].text

    def fill_in(self, every: list[Shown], index: int) -> list[Any]:
        """Fill in the fields that made the picture chosen."""
        return [getattr(every[index].form, name) if every else gr.skip() for name in self.fields]

    def fill_in_defaults(self, title: str) -> tuple[int, float, int, int]:
        """Fill in the steps, scale and size of the model chosen."""
        return defaults(self.studio.shelf.find(title).spec, self.studio.limits.side)

    def _show(self, drawing: Drawing, picture: Drawn, form: Form) -> Shown:
        path = Path(self.folder.name) / f"{next(self.numbers):06}.png"
        write_png(path, picture.image, picture.texts)
        stopped = "" if picture.whole else ", stopped"
        return Shown(
            path=str(path),
            caption=f"seed {picture.seed}, {drawing.request.model}{stopped}",
            text=picture.texts["parameters"],
            form=replace(form, seed=picture.seed, pictures=1),
        )


def _summary(drawing: Drawing) -> str:
    count = len(drawing.pictures)
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    stopped = ", stopped" if drawing.interrupted else ""
    return f"{pictures}{stopped}: {drawing.seconds:.2f} s, {drawing.memory / 1e9:.2f} GB of memory"


def _fields(studio: Studio) -> dict[str, Any]:
    """Return the fields, by their names in a Form."""
    shelf, limits = studio.shelf, studio.limits
    steps, scale, width, height = defaults(shelf.first.spec, limits.side)
    loras = f" LoRAs, as <lora:NAME:SCALE>: {', '.join(shelf.loras)}." if shelf.loras else ""
    fields: dict[str, Any] = {
        "prompt": gr.Textbox(label="Prompt", info=f"(word:1.2) gives weight.{loras}", lines=2, elem_id="prompt"),
        "negative": gr.Textbox(label="Negative prompt", elem_id="negative"),
    }
    with gr.Row():
        fields["model"] = gr.Dropdown(list(shelf.entries), value=shelf.first.title, label="Model and bits")
        fields["sampler"] = sampler_choice()
    with gr.Row():
        fields["steps"] = gr.Slider(1, limits.steps, min(steps, limits.steps), step=1, label="Steps", elem_id="steps")
        fields["scale"] = gr.Slider(0, 20, scale, step=0.1, label="Guidance scale")
    with gr.Row():
        fields["width"] = whole_number("Width", width, maximum=limits.side)
        fields["height"] = whole_number("Height", height, maximum=limits.side)
        fields["seed"] = whole_number("Seed (-1: any)", -1, minimum=-1, name="seed")
        fields["pictures"] = whole_number("Pictures", 1, maximum=limits.pictures)
    with gr.Row():
        fields["ratio"] = gr.Slider(0, 0.75, 0, step=0.05, label="Merged tokens", info="0.5 is wise; 0 merges none")
        info = "merged keys count as often: few steps need it"
        fields["proportional"] = gr.Checkbox(False, label="Proportional", info=info)
        fields["cache"] = whole_number("Whole steps", 1, info="every N-th; 1 is all")
        fields["vae"] = gr.Dropdown([AUTOMATIC, *VAES], value=AUTOMATIC, label="Decoder", info="tiny is the fastest")
    return fields
