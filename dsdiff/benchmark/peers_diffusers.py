"""diffusers' networks of the same sizes, with weights of their own. Runs in a worker only (see `worker`)."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging
from torch import nn

from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import Engine, float_engine


def build(source: Source, dtype: torch.dtype) -> Engine:
    """Build diffusers' UNet in this dtype. Raises ValueError, with the reason, where it has none like ours."""
    params = source.unet_config["params"]
    check_sizes(source)
    x, timesteps, context = source.inputs().values()
    inputs = {"sample": x, "timestep": timesteps, "encoder_hidden_states": context, "return_dict": False}
    return float_engine(make_unet(params).to(source.device).eval(), inputs, dtype)


def check_sizes(source: Source) -> None:
    """Raise ValueError unless diffusers' UNet has as many parameters as ours."""
    try:
        with torch.device("meta"):
            theirs = sum(parameter.numel() for parameter in make_unet(source.unet_config["params"]).parameters())
    except (ValueError, KeyError) as error:
        raise ValueError(f"its UNet cannot have these sizes: {error}") from error
    ours = source.parameters()
    if theirs != ours:
        raise ValueError(f"its UNet of these sizes has {theirs} parameters, in place of {ours}")


def make_unet(params: Mapping[str, Any], side: int | None = None) -> nn.Module:
    """Make a UNet2DConditionModel of the sizes of a UNetModel with these params. side: of its latents by default."""
    logging.set_verbosity_error()  # it warns of every change of dtype
    mult = params["channel_mult"]
    attends = [2**level in params["attention_resolutions"] for level in range(len(mult))]
    down, up = ([f"CrossAttn{way}Block2D" if on else f"{way}Block2D" for on in attends] for way in ("Down", "Up"))
    with torch.random.fork_rng(devices=[]):
        return UNet2DConditionModel(
            sample_size=side,
            in_channels=params["in_channels"],
            out_channels=params["out_channels"],
            block_out_channels=tuple(params["model_channels"] * factor for factor in mult),
            layers_per_block=params["num_res_blocks"],
            down_block_types=tuple(down),
            up_block_types=tuple(reversed(up)),
            cross_attention_dim=params["context_dim"],
            attention_head_dim=params["num_heads"],  # diffusers' name for it
            norm_num_groups=params.get("norm_groups", 32),
        )


def make_autoencoder(params: Mapping[str, Any], scale: float) -> nn.Module:
    """Make an AutoencoderKL of the sizes of ours with these params. scale: the factor of its latents."""
    sizes = params["ddconfig"]
    blocks: dict[str, Any] = {  # annotated there as of one level
        "down_block_types": ("DownEncoderBlock2D",) * len(sizes["ch_mult"]),
        "up_block_types": ("UpDecoderBlock2D",) * len(sizes["ch_mult"]),
    }
    return AutoencoderKL(
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_ch"],
        latent_channels=params["embed_dim"],
        block_out_channels=tuple(sizes["ch"] * factor for factor in sizes["ch_mult"]),
        layers_per_block=sizes["num_res_blocks"],
        **blocks,
        norm_num_groups=sizes.get("norm_groups", 32),
        sample_size=sizes["resolution"],
        scaling_factor=scale,
    )
