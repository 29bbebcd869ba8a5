"""Write a LatentDiffusion as a folder that diffusers loads."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.diffusers_config import PREDICTIONS, SCHEDULER_FILE, SCHEDULES, TOKENIZER_CONFIG
from ldm.diffusers_folder import CONFIG_FILE, INDEX_FILE, STEMS
from ldm.diffusers_names import PREFIXES, weight_names
from ldm.fileio import write_folder_atomically
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import ClipTextConfig
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.tensor_files import save_tensors

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# What other values of a UNet's attributes have no counterpart in diffusers' UNet2DConditionModel.
UNET_NEEDS = {"use_spatial_transformer": True, "resblock_updown": False, "use_scale_shift_norm": False, "dims": 2}
UNET_NEEDS |= {"num_classes": None, "conv_resample": True}


def save_folder(model: LatentDiffusion, ddconfig: Mapping[str, Any], folder: Path) -> None:
    """Write the folder of a StableDiffusionPipeline with the weights of `model`, complete or not at all.

    ddconfig: the arguments of the autoencoder's Decoder. Weights keep their type. The scheduler is DDIM, with the times
    that our sampler has.

    Raises ValueError for a model that diffusers' classes cannot hold, and for a folder that has content.
    """
    encoder = model.cond_stage_model
    if not isinstance(encoder, FrozenCLIPEmbedder):
        raise ValueError(f"diffusers' pipeline needs CLIP as its text encoder, and not a {type(encoder).__name__}")
    unet = unet_config(model.model.diffusion_model, model.image_size)
    text = encoder.transformer.text_model.config
    vae = vae_config(ddconfig, model.scale_factor)
    configs = {
        INDEX_FILE: PIPELINE,
        f"unet/{CONFIG_FILE}": unet,
        f"vae/{CONFIG_FILE}": vae,
        f"text_encoder/{CONFIG_FILE}": text_config(text, encoder.tokenizer),
        f"scheduler/{SCHEDULER_FILE}": scheduler_config(model),
    }
    tokenizer = encoder.tokenizer

    def write(temporary: Path) -> None:
        for name in (*PREFIXES, "tokenizer", "scheduler"):
            (temporary / name).mkdir()
        for name, config in configs.items():
            _write_json(temporary / name, config)
        tokenizer.save(temporary / "tokenizer")
        _complete_tokenizer(temporary / "tokenizer", encoder.max_length)
        for network, prefix in PREFIXES.items():
            state = model.get_submodule(prefix.rstrip(".")).state_dict()
            names = weight_names(network, state)
            # Newer versions of transformers compute the positions' numbers, and older ones accept a file without.
            kept = {names[key]: _in_their_shape(names[key], tensor) for key, tensor in state.items()}
            kept = {name: tensor for name, tensor in kept.items() if tensor.is_floating_point()}
            save_tensors(kept, temporary / network / f"{STEMS[network][0]}.safetensors", {"format": "pt"})

    write_folder_atomically(folder, write)


def _in_their_shape(name: str, tensor: Tensor) -> Tensor:
    """Return a weight on the CPU. The autoencoder's attention, 1x1 convolutions of ours, has linear layers there."""
    linear = bool(re.search(r"mid_block\.attentions\.0\.to_\w+(\.0)?\.weight$", name)) and tensor.ndim == 4
    return (tensor[:, :, 0, 0] if linear else tensor).detach().cpu().contiguous()


def unet_config(unet: UNetModel, sample_size: int) -> dict[str, Any]:
    """Return the config of diffusers' UNet2DConditionModel that computes the same. Raises ValueError if none does."""
    for name, needed in UNET_NEEDS.items():
        if getattr(unet, name) != needed:
            raise ValueError(f"diffusers' UNet cannot hold a UNet with {name} {getattr(unet, name)!r}")
    if unet.num_heads_upsample != unet.num_heads:
        raise ValueError("diffusers' UNet cannot hold a UNet with other heads on its way up")
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**i in unet.attention_resolutions for i in range(len(widths))]
    by_size = unet.num_head_channels != -1
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out[-1].out_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if with_it else "DownBlock2D" for with_it in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if with_it else "UpBlock2D" for with_it in reversed(attends)],
        "layers_per_block": unet.num_res_blocks,
        "transformer_layers_per_block": unet.transformer_depth,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": [width // unet.num_head_channels for width in widths] if by_size else unet.num_heads,
        "norm_num_groups": unet.norm_groups,
        "time_cond_proj_dim": unet.time_cond_proj_dim,
    }


def vae_config(ddconfig: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """Return the config of diffusers' AutoencoderKL that computes the same. Raises ValueError if none does."""
    mults = ddconfig.get("ch_mult", (1, 2, 4, 8))
    if ddconfig.get("attn_resolutions") or not ddconfig.get("resamp_with_conv", True):
        raise ValueError("diffusers' AutoencoderKL cannot hold one with attention at several sizes, or with averaging")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": ddconfig["resolution"],
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "latent_channels": ddconfig["z_channels"],
        "block_out_channels": [ddconfig["ch"] * mult for mult in mults],
        "down_block_types": ["DownEncoderBlock2D"] * len(mults),
        "up_block_types": ["UpDecoderBlock2D"] * len(mults),
        "layers_per_block": ddconfig["num_res_blocks"],
        "norm_num_groups": ddconfig.get("norm_groups", 32),
        "scaling_factor": scale_factor,
    }


def text_config(config: ClipTextConfig, tokenizer: ClipTokenizer) -> dict[str, Any]:
    """Return the config of transformers' CLIPTextModel, with the tokenizer's special tokens."""
    own = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "projection_dim": config.hidden_size}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return own | ids | asdict(config)


def scheduler_config(model: LatentDiffusion) -> dict[str, Any]:
    """Return the config of diffusers' DDIMScheduler for the noise process of a model.

    Raises ValueError for a schedule that it does not know.
    """
    schedule, timesteps, start, end, *_ = model.schedule
    theirs = {ours: name for name, ours in SCHEDULES.items()}
    if schedule not in theirs:
        raise ValueError(f"diffusers has no schedule of noise like beta_schedule {schedule!r}")
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": theirs[schedule],
        "beta_start": start,
        "beta_end": end,
        "num_train_timesteps": timesteps,
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[model.parameterization],
        "rescale_betas_zero_snr": model.rescale_betas_zero_snr,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _complete_tokenizer(folder: Path, length: int) -> None:
    """Add the files that older versions of transformers read, and the length of a prompt."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write_json(folder / "vocab.json", content["vocab"])
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    settings = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    _write_json(folder / TOKENIZER_CONFIG, settings | {"model_max_length": length})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
