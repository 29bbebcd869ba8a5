"""The contexts of prompts: what the text encoder makes of them, for the UNet's cross-attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import precision_context
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.chunks import PromptStyle
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from qdiff.engine.cpu import has_bfloat16

CONTEXTS = 8  # batches of prompts whose contexts are kept


class PromptContexts:
    """Encodes prompts, and keeps the contexts of the last CONTEXTS batches.

    They are kept by batch, as rounding may depend on the others of a batch. With autocast, the text encoder computes in
    bfloat16 on CPUs that have it; on GPUs, where it takes no time, in float32.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: dict[tuple[object, ...], Tensor] = {}  # last used at the end

    def clear(self) -> None:
        """Drop all contexts, as a model that changes must."""
        self._kept.clear()

    def lengths(self, model: LatentDiffusion, prompts: Sequence[str], settings: DrawSettings) -> list[int]:
        """Return how many chunks of tokens the context of each prompt has: its own, or the negative prompt's if more.

        It depends on nothing else of a batch, so that a picture does not either.
        """
        encoder = model.cond_stage_model
        if settings.long_prompts == "cut" or not isinstance(encoder, FrozenCLIPEmbedder):
            return [1] * len(prompts)
        style = _style(settings)
        least = len(encoder.chunks(settings.negative_prompt, style)) if settings.guides else 1
        return [max(len(encoder.chunks(prompt, style)), least) for prompt in prompts]

    def encode(self, model: LatentDiffusion, prompts: Sequence[str], settings: DrawSettings, length: int) -> Tensor:
        """Return the contexts [B, M, D] of prompts, float32. length: the chunks of each, filled up by empty ones."""
        quick = settings.precision == "autocast" and self.device.type == "cpu" and has_bfloat16()
        kept, key = self._kept, (settings.precision, _style(settings), length, *prompts)
        if key not in kept:
            with precision_context(self.device, "autocast" if quick else "full"):
                kept[key] = _encode(model, prompts, _style(settings), length)
        kept[key] = kept.pop(key)
        while len(kept) > CONTEXTS:
            del kept[next(iter(kept))]
        return kept[key]


def _style(settings: DrawSettings) -> PromptStyle:
    return PromptStyle(weights=settings.prompt_weights, long=settings.long_prompts)


def _encode(model: LatentDiffusion, prompts: Sequence[str], style: PromptStyle, length: int) -> Tensor:
    encoder = model.cond_stage_model
    if not isinstance(encoder, FrozenCLIPEmbedder):  # one without tokens takes the text as it is
        return model.get_learned_conditioning(list(prompts)).float()
    batch = [encoder.chunks(prompt, style) for prompt in prompts]
    return encoder.encode_chunks([chunks + encoder.chunks("", style) * (length - len(chunks)) for chunks in batch])


def rows_by_length(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows of a batch by their number of chunks: each group has contexts of one size."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return groups
