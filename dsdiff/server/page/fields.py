"""Fields that both tabs have."""

import gradio as gr

from dsdiff.record import USUAL_NAMES


def whole_number(
    label: str, value: int, *, minimum: int = 1, maximum: int | None = None, info: str | None = None, name: str = ""
) -> gr.Number:
    """Return a narrow field for a whole number. name: its id in the page."""
    return gr.Number(
        value,
        label=label,
        info=info,
        precision=0,
        minimum=minimum,
        maximum=maximum,
        min_width=90,
        elem_id=name or None,
    )


def sampler_choice() -> gr.Dropdown:
    """Return the field of samplers."""
    return gr.Dropdown(list(USUAL_NAMES.values()), value=USUAL_NAMES["ddim"], label="Sampler")
