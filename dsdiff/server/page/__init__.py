"""The page at /: drawing, and the same picture side by side at other settings. It loads nothing from elsewhere."""

import os
import tempfile
from typing import TYPE_CHECKING

from dsdiff.server.options import ServerOptions
from dsdiff.server.page.figures import STYLE
from dsdiff.server.studio import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI

FONTS = ("system-ui", "sans-serif")
MONOSPACED = ("ui-monospace", "monospace")


def mount(app: "FastAPI", studio: Studio, options: ServerOptions) -> "FastAPI":
    """Put the page at / of an application, below its routes. Needs gradio.

    Pictures are kept in a temporary folder as long as the page shows them, and until the process ends at most.
    """
    folder = tempfile.TemporaryDirectory(prefix="dsdiff-page-")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it as it is imported
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    import gradio as gr
    from gradio.themes import Base

    from dsdiff.server.page.compare import CompareTab
    from dsdiff.server.page.draw import DrawTab

    with gr.Blocks(title="DSDiff", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# DSDiff")
        with gr.Tab("Draw"):
            DrawTab(studio, folder)
        with gr.Tab("Compare"):
            CompareTab(studio)
    blocks.queue(default_concurrency_limit=options.limits.queue + 1, api_open=False)
    theme = Base(font=FONTS, font_mono=MONOSPACED)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=1,  # bytes: the page takes no files
        theme=theme,
        css=STYLE,
    )
