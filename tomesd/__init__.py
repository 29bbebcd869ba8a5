"""Token merging for diffusion models: fewer tokens inside the transformer blocks, pictures nearly unchanged.

    tomesd.apply_patch(model, ratio=0.5)  # merge half of the tokens
    ...                                   # draw pictures
    tomesd.remove_patch(model)            # the model is bit for bit what it was

Works on any model, quantized or not, whose blocks are called BasicTransformerBlock: ours, and those of diffusers.
"""

from . import merge, patch
from .patch import MergeOptions, TokenCount, apply_patch, pinned, remove_patch, reseed, token_report

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
]
