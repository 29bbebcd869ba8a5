"""Configs of diffusers' folders as configs of ours, and the reverse."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ldm.architectures import other_folder
from ldm.diffusers_folder import CONFIG_FILE, INDEX_FILE, read_json, vae_folder
from ldm.modules.encoders.clip import ClipTextConfig

SCHEDULER_FILE = "scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# diffusers' name of a schedule of noise -> CompVis's, whose "linear" is linear in the root of beta.
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
# Stable Diffusion v1's scheduler, for a folder without one.
SD_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TEXT_MODELS = (None, "clip_text_model", "clip")

# Entries of a config whose other values would change what is computed. Others are read, or change nothing.
UNET_NEUTRAL = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
VAE_NEUTRAL = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
SCHEDULER_NEUTRAL = {"trained_betas": (None,)}


# --- theirs as ours ----------------------------------------------------------------------------------------


def config_of_folder(folder: Path, name: str) -> dict[str, Any]:
    """Return the whole config, as a yaml file holds it, of the pipeline in a folder. name: of the model, in words.

    Raises FileNotFoundError or ValueError, in one line, for files that are missing, damaged or of another architecture.
    """
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    parts = [part.name for part in folder.iterdir() if part.is_dir()]
    unet = read_json(folder / "unet" / CONFIG_FILE) if "unet" in parts else {}
    other = other_folder(str(index.get("_class_name", "")), parts, unet)
    if other:
        raise ValueError(f"{str(folder)!r} holds no Stable Diffusion 1: it is {other}")
    vae, text = read_json(vae_folder(folder) / CONFIG_FILE), read_json(folder / "text_encoder" / CONFIG_FILE)
    scheduler = folder / "scheduler" / SCHEDULER_FILE
    try:
        params = _noise(read_json(scheduler) if scheduler.is_file() else SD_SCHEDULER) | {
            "image_size": unet.get("sample_size") or 64,
            "channels": vae.get("latent_channels", 4),
            "scale_factor": vae.get("scaling_factor", 0.18215),
            "use_ema": False,
            "conditioning_key": "crossattn",
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": unet_params(unet),
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae_params(vae)},
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": text_params(text, _tokens(folder / "tokenizer")),
            },
        }
    except (TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"{str(folder)!r} is damaged: a config in it cannot be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}") from error
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    side = params["image_size"] * 2 ** (len(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
    sampling = {"description": name, "height": side, "width": side, "steps": 50, "scale": 7.5}
    return {"model": model, "sampling": sampling}


def _noise(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process of noise. Entries that a file leaves out have diffusers' defaults."""
    _check("scheduler", scheduler, SCHEDULER_NEUTRAL)
    schedule = scheduler.get("beta_schedule", "linear")
    prediction = scheduler.get("prediction_type", "epsilon")
    for what, value, known in (("beta_schedule", schedule, SCHEDULES), ("prediction_type", prediction, PREDICTIONS)):
        if value not in known:
            raise ValueError(f"scheduler: {what} {value!r} is not supported: only {', '.join(known)} are")
    unusual: dict[str, Any] = {} if prediction == "epsilon" else {"parameterization": PREDICTIONS[prediction]}
    if scheduler.get("rescale_betas_zero_snr"):
        unusual["rescale_betas_zero_snr"] = True
    return unusual | {
        "beta_schedule": SCHEDULES[schedule],
        "linear_start": scheduler.get("beta_start", 0.0001),
        "linear_end": scheduler.get("beta_end", 0.02),
        "timesteps": scheduler.get("num_train_timesteps", 1000),
    }


def unet_params(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of UNetModel for a config of diffusers' UNet2DConditionModel.

    Raises ValueError for one whose UNet computes otherwise.
    """
    _check("unet", unet, UNET_NEUTRAL)
    widths = unet["block_out_channels"]
    with_attention = ["CrossAttn" in kind for kind in unet["down_block_types"]]
    kinds = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    expected = [kinds[attends] for attends in with_attention]
    found = list(zip(unet["down_block_types"], reversed(unet["up_block_types"]), strict=False))
    if found != expected or len(widths) != len(expected) or any(width % widths[0] for width in widths):
        raise ValueError(f"unet: blocks {found} of {widths} channels are not supported")
    # `attention_head_dim` is the number of heads, in spite of its name, unless `num_attention_heads` is given.
    heads = _per_level(unet.get("num_attention_heads") or unet.get("attention_head_dim", 8), len(widths))
    sizes = {width // head for width, head in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(sizes) > 1:
        raise ValueError(f"unet: {heads} heads of {widths} channels are not supported")
    attention = {"num_heads": heads[0]} if len(set(heads)) == 1 else {"num_head_channels": sizes.pop()}
    unusual = {"time_cond_proj_dim": unet.get("time_cond_proj_dim"), "norm_groups": unet.get("norm_num_groups", 32)}
    usual = (("time_cond_proj_dim", None), ("norm_groups", 32))
    return (
        attention
        | {name: value for name, value in unusual.items() if (name, value) not in usual}
        | {
            "image_size": unet.get("sample_size") or 64,
            "in_channels": unet.get("in_channels", 4),
            "out_channels": unet.get("out_channels", 4),
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "attention_resolutions": [2**i for i, attends in enumerate(with_attention) if attends],
            "num_res_blocks": _same("unet", "layers_per_block", unet.get("layers_per_block", 2)),
            "transformer_depth": _same(
                "unet", "transformer_layers_per_block", unet.get("transformer_layers_per_block", 1)
            ),
            "context_dim": _same("unet", "cross_attention_dim", unet.get("cross_attention_dim", 1280)),
            "use_spatial_transformer": True,
            "use_checkpoint": True,
            "legacy": False,
        }
    )


def vae_params(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL for a config of diffusers' class of that name.

    Raises ValueError for one that computes otherwise.
    """
    _check("vae", vae, VAE_NEUTRAL)
    widths, latent = vae["block_out_channels"], vae.get("latent_channels", 4)
    kinds = {*vae["down_block_types"], *vae["up_block_types"]}
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"} or any(width % widths[0] for width in widths):
        raise ValueError(f"vae: blocks {sorted(kinds)} of {widths} channels are not supported")
    ddconfig = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,  # nominal, as in CompVis's config: it has no effect without attn_resolutions
        "in_channels": vae.get("in_channels", 3),
        "out_ch": vae.get("out_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": _same("vae", "layers_per_block", vae.get("layers_per_block", 1)),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    if vae.get("norm_num_groups", 32) != 32:
        ddconfig["norm_groups"] = vae["norm_num_groups"]
    return {"embed_dim": latent, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}


def text_params(text: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    """Return the arguments of FrozenCLIPEmbedder for a config of transformers' CLIPTextModel, or of a whole CLIP.

    tokens: the length of a prompt; None takes all positions. Raises ValueError for another text encoder.
    """
    if text.get("model_type") not in TEXT_MODELS:
        raise ValueError(f"text_encoder: a {text['model_type']} is not supported: Stable Diffusion 1 has CLIP's")
    text = text.get("text_config", text)
    known = {field.name: text[field.name] for field in fields(ClipTextConfig) if field.name in text}
    config = ClipTextConfig.from_fields(known)
    length = min(tokens or config.max_position_embeddings, config.max_position_embeddings)
    sizes = {} if config == ClipTextConfig() else {"version": "clip", "text_config": asdict(config)}
    return sizes | ({} if length == 77 else {"max_length": length})


def _tokens(folder: Path) -> int | None:
    """Return how many tokens a tokenizer's prompts have; None where it sets no limit."""
    path = folder / TOKENIZER_CONFIG
    length = read_json(path).get("model_max_length") if path.is_file() else None
    return length if isinstance(length, int) and 2 <= length <= 10**6 else None


def _check(part: str, config: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in neutral.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{part}: {name} {config[name]!r} is not supported: only {values[0]!r} is")


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def _same(part: str, name: str, value: int | Sequence[int]) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ValueError(f"{part}: {name} {value!r} is not supported: all levels must have the same")
    return values.pop()
