"""DSDiff: text-to-image diffusion made small and fast, by few-bit integers and fewer tokens.

    import dsdiff

    pipe = dsdiff.load("embedded", engine="int8", ratio=0.5)
    for picture in pipe.draw(["a red circle on a blue background"]):
        picture.image.save("circle.png")

Importing this package imports no torch: names are looked up at first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdiff.draw_settings import DrawSettings
    from dsdiff.models.spec import ModelSpec, find_model
    from dsdiff.options import (
        DrawOptions,
        EmbeddingOptions,
        InitOptions,
        LoraOptions,
        MergeOptions,
        ModelOptions,
        QuantizationOptions,
    )
    from dsdiff.pipeline import Picture, Pipeline, load

# Large tensors in large pages (Linux), for which the system makes room several times faster. PyTorch reads it when it
# makes the first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = [
    "DrawOptions",
    "DrawSettings",
    "EmbeddingOptions",
    "InitOptions",
    "LoraOptions",
    "MergeOptions",
    "ModelOptions",
    "ModelSpec",
    "Picture",
    "Pipeline",
    "QuantizationOptions",
    "find_model",
    "load",
]

_HOMES = {
    "DrawOptions": "dsdiff.options",
    "EmbeddingOptions": "dsdiff.options",
    "InitOptions": "dsdiff.options",
    "LoraOptions": "dsdiff.options",
    "DrawSettings": "dsdiff.draw_settings",
    "MergeOptions": "dsdiff.options",
    "ModelOptions": "dsdiff.options",
    "ModelSpec": "dsdiff.models.spec",
    "Picture": "dsdiff.pipeline",
    "Pipeline": "dsdiff.pipeline",
    "QuantizationOptions": "dsdiff.options",
    "find_model": "dsdiff.models.spec",
    "load": "dsdiff.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
