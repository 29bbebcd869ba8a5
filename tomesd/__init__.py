"""Token merging for diffusion models: fewer tokens inside the transformer blocks, pictures nearly unchanged.

    tomesd.apply_patch(model, ratio=0.5)  # merge half of the tokens
    ...                                   # draw pictures
    tomesd.remove_patch(model)            # the model is bit for bit what it was

This works on any model, quantized or not, whose blocks are called BasicTransformerBlock: ours, and those of diffusers.

torch is imported at the first use of a name that needs it, so that a command can read its options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import MergeOptions

if TYPE_CHECKING:
    from . import merge, patch
    from .patch import apply_patch, pinned, remove_patch, reseed, token_report, walk
    from .state import TokenCount

__all__ = [
    "MergeOptions",
    "TokenCount",
    "apply_patch",
    "merge",
    "patch",
    "pinned",
    "remove_patch",
    "reseed",
    "token_report",
    "walk",
]

_SUBMODULES = ("merge", "patch")


def __getattr__(name: str) -> Any:  # PEP 562: called for names that are not here yet
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(".patch", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
