"""CLIP scores: how near a picture is to its prompt, by OpenAI's CLIP or by that of the embedded model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdiff.models.configs import read_config
from dsdiff.models.registry import ROOT, SHAPES_CLIP, SHAPES_CLIP_CONFIG, TOKENIZER
from ldm.checkpoint import read_weights
from ldm.models.clip import ContrastiveModel
from ldm.util import instantiate_from_config

CLIP = "openai/clip-vit-large-patch14"  # its name on the Hugging Face hub

ClipScore = Callable[[Tensor, Sequence[str]], Tensor]  # uint8 [B, 3, H, W] and their prompts -> [B]


def build_clip(source: str, device: torch.device) -> ClipScore:
    """Return the CLIP score of Hessel et al. 2021: (uint8 [B, 3, H, W], prompts) -> [B], 100 times the cosine, >= 0.

    source: a folder, or a name in Hugging Face's cache. Raises OSError if its files are not there; nothing is fetched.
    """
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(source, local_files_only=True)
    model = model.to(device).eval()
    processor: Any = CLIPProcessor.from_pretrained(source, local_files_only=True)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True
        ).to(device)
        found = model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return (100 * cosines).clamp(min=0).cpu()

    return score


def build_shapes_clip(device: torch.device, weights: Path = SHAPES_CLIP) -> ClipScore:
    """Return the same score by the embedded model's own CLIP, which knows its captions and nothing else.

    weights: its file. Raises OSError if that is not there, ValueError if it holds other weights.
    """
    if not weights.is_file():
        raise FileNotFoundError(
            f"no CLIP of the shapes at {str(weights)!r}: train it with scripts/train.py "
            f"--config {SHAPES_CLIP_CONFIG.relative_to(ROOT)} --export {weights}"
        )
    config = read_config(SHAPES_CLIP_CONFIG)["model"]
    config["params"]["text_config"]["params"]["tokenizer"] = str(TOKENIZER)
    model: ContrastiveModel = instantiate_from_config({name: config[name] for name in ("target", "params")})
    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        raise ValueError(f"{str(weights)!r} does not hold the weights of {SHAPES_CLIP_CONFIG}") from error
    model.to(device).eval()

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = model.embed_images(images.to(device).float() / 127.5 - 1)
        cosines = (pictures * model.embed_texts(prompts)).sum(dim=1)
        return (100 * cosines).clamp(min=0).cpu()

    return score
