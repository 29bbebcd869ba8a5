"""Recognise files and folders of other models than Stable Diffusion 1, by names and shapes, to refuse them by name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

SD2 = "a Stable Diffusion 2 checkpoint (OpenCLIP, context of 1024)"
SDXL = "a Stable Diffusion XL checkpoint"
REFINER = "a Stable Diffusion XL refiner"
SD3 = "a Stable Diffusion 3 checkpoint"
FLUX = "a Flux checkpoint"

# Pattern of a name in a file -> words for the error message. The first that is found counts.
KEYS: Sequence[tuple[str, str]] = (
    (r"weight_quantizer", "a cali_ckpt, which goes on top of a float model: give it with --ptq --cali_ckpt"),
    (r"lora_", "a LoRA, which holds changes to a model and no model: give it with --lora"),
    (r"string_to_param|^emb_params$", "an embedding of textual inversion, which holds a word and no model"),
    (r"^control_model\.|controlnet_", "a ControlNet, which goes beside a model"),
    (r"^conditioner\.embedders\.0\.model\.", REFINER),
    (r"conditioner\.embedders\.|\.label_emb\.|add_embedding\.", SDXL),
    (r"joint_blocks\.", SD3),
    (r"double_blocks\.|single_transformer_blocks\.", FLUX),
    (r"cond_stage_model\.model\.", SD2),
    (r"^(down|up|mid)_blocks?\.", "the UNet of a diffusers folder: give the whole folder, or its hub id"),
    (r"^(text_model\.|vision_model\.)", "a text encoder alone, a part of a model"),
    (r"^(encoder|decoder)\.(down|up|mid|conv)", "an autoencoder alone: give it with --vae_ckpt, beside a --ckpt"),
)
# Width of the context -> whose it is.
CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL's refiner", 2048: "XL"}
CONTEXT_KEY = ".attn2.to_k.weight"  # [channels, context_dim]
# Channels that a UNet takes -> what it is for, where these are not those of the latents alone.
INPUTS = {
    9: "an inpainting model (its UNet takes 9 channels)",
    8: "a model that changes pictures by instructions, or an upscaler (its UNet takes 8 channels)",
    7: "an upscaler (its UNet takes 7 channels)",
    5: "a model that takes depth (its UNet takes 5 channels)",
}
INPUT_KEY = "input_blocks.0.0.weight"  # [channels, in_channels, 3, 3]
# A part of the class in a folder's model_index.json -> what the folder holds.
PIPELINES: Sequence[tuple[str, str]] = (
    ("StableDiffusionXL", SDXL),
    ("StableDiffusion3", SD3),
    ("Flux", FLUX),
    ("Inpaint", INPUTS[9]),
    ("InstructPix2Pix", INPUTS[8]),
    ("Upscale", INPUTS[7]),
    ("Depth2Img", INPUTS[5]),
)


def other_file(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> str:
    """Return what a file with these weights seems to be, to end an error message with; empty if nothing identifies it.

    known: the weights of the model that it was to be.
    """
    for pattern, what in KEYS:
        if any(re.search(pattern, name) for name in tensors) and not any(re.search(pattern, name) for name in known):
            return f": it looks like {what}"
    for name in tensors:
        if name not in known:
            continue
        if name.endswith(CONTEXT_KEY) and tensors[name].ndim == 2:
            found, expected = tensors[name].shape[1], known[name].shape[1]
            if found != expected:
                return f": its text encoder has {found} channels, the config's {expected} ({_contexts()})"
        if name.endswith(INPUT_KEY) and tensors[name].ndim == 4:
            found, expected = tensors[name].shape[1], known[name].shape[1]
            if found != expected and found in INPUTS:
                return f": it looks like {INPUTS[found]}"
    return ""


def _contexts() -> str:
    return ", ".join(f"{name.replace('Stable Diffusion', 'SD')}: {width}" for width, name in CONTEXTS.items())


def other_folder(pipeline: str, parts: Iterable[str], unet: Mapping[str, Any]) -> str:
    """Return what a folder of diffusers holds that is not Stable Diffusion v1; empty for one that may be.

    pipeline: the class in its model_index.json, "" without one. parts: its subfolders. unet: the UNet's config.
    """
    parts = set(parts)
    for part, what in PIPELINES:
        if part in pipeline:
            return what
    if "text_encoder_2" in parts or unet.get("addition_embed_type") == "text_time":
        return SDXL if "text_encoder" in parts or unet.get("cross_attention_dim") == 2048 else REFINER
    if "transformer" in parts:
        return "a model with a transformer in place of a UNet"
    if unet.get("in_channels") in INPUTS:
        return INPUTS[unet["in_channels"]]
    return SD2 if unet.get("cross_attention_dim") == 1024 else ""
