"""The options that flags become. `arguments` says what flags there are."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsdiff.options import (
    STOCHASTIC,
    DrawOptions,
    InitOptions,
    MergeOptions,
    ModelOptions,
    QuantizationOptions,
)

if TYPE_CHECKING:
    from dsdiff.models.spec import ModelSpec

TOME_FLAGS = (
    "max_downsample",
    "sx",
    "sy",
    "use_rand",
    "merge_attn",
    "merge_crossattn",
    "merge_mlp",
    "proportional",
    "merge_kv",
    "merge_schedule",
    "merge_levels",
    "merge_every",
    "merge_share",
)
QUANTIZATION_FLAGS = (
    "ptq",
    "quant_act",
    "weight_bit",
    "act_bit",
    "quant_mode",
    "cali_ckpt",
    "cond",
    "no_grad_ckpt",
    "split",
    "sm_abit",
    "act_range",
    "engine",
    "low_memory",
)


def given_flags(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return those of the flags `names` that the user passed. The flags have no defaults; some may not be there."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def model_options(args: argparse.Namespace) -> ModelOptions:
    """Return the options that --ckpt, --config, --tokenizer and --vae_ckpt mean."""
    return ModelOptions(ckpt=args.ckpt, config=args.config, tokenizer=args.tokenizer, vae_ckpt=args.vae_ckpt)


def draw_options(args: argparse.Namespace) -> DrawOptions:
    """Return the options that the flags of sampler, size, precision, decoder and merging mean.

    Those of size, decoder and merging may be absent.
    Raises ValueError for flags that would have no effect.
    """
    sampler = args.sampler or ("plms" if args.plms else "dpm_solver" if args.dpm_solver else "ddim")
    if args.ddim_eta is not None and sampler not in STOCHASTIC:
        flag = f"--sampler {sampler}" if args.sampler else f"--{sampler}"
        raise ValueError(f"--ddim_eta {args.ddim_eta:g} has no effect with {flag}: it is for {', '.join(STOCHASTIC)}")
    guidance = given_flags(args, ("negative_prompt", "guidance_start", "guidance_stop"))
    if guidance and args.scale == 1:
        named = ", ".join(f"--{name}" for name in guidance)
        raise ValueError(f"{named} has no effect with --scale 1, which is no guidance: use a larger scale")
    size = given_flags(args, ("H", "W"))
    return DrawOptions(
        height=size.get("H"),
        width=size.get("W"),
        sampler=sampler,
        steps=args.ddim_steps,
        eta=args.ddim_eta,
        scale=args.scale,
        **guidance,
        **given_flags(args, ("prompt_weights", "long_prompts")),
        **given_flags(args, ("cache", "cache_depth")),
        precision=args.precision,
        **given_flags(args, ("vae", "vae_tiling", "tiny_decoder")),
        merge=merge_options(args) if "ratio" in args else None,
        init=init_options(args) if "init" in args else None,
    )


def init_options(args: argparse.Namespace) -> InitOptions:
    """Return the options of drawing from a picture. Raises ValueError for flags that would have no effect."""
    of_masks = given_flags(args, ("mask_blur", "paste"))
    if of_masks and args.mask is None:
        raise ValueError(f"--{next(iter(of_masks))} has no effect without --mask: leave it out")
    if of_masks.get("paste") is False and "mask_blur" in of_masks:
        raise ValueError("--mask_blur has no effect with --no-paste: leave one of them out")
    return InitOptions(**of_masks, **given_flags(args, ("strength", "resize")))


def check_latent_flags(args: argparse.Namespace, spec: "ModelSpec") -> None:
    """Raise ValueError for a --C or --f that is not the model's."""
    for flag, own in (("C", spec.channels), ("f", spec.factor)):
        given = getattr(args, flag)
        if given not in (None, own):
            raise ValueError(f"--{flag} {given} contradicts the model, which has {own}: leave it out")


def quantization_options(args: argparse.Namespace, *, bundle: bool = False) -> QuantizationOptions | None:
    """Return the options that --ptq and its group mean; None without them.

    bundle: the checkpoint is quantized already, so that --ptq need not be said. Raises ValueError for flags that would
    have no effect.
    """
    given = given_flags(args, QUANTIZATION_FLAGS)
    if not bundle and "ptq" not in given:
        if given:
            flags = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"without --ptq nothing is quantized, so {flags} has no effect: add --ptq")
        return None
    given.pop("ptq", None)
    return QuantizationOptions(**given)


def quantization_of(args: argparse.Namespace, spec: "ModelSpec") -> QuantizationOptions | None:
    """Return `quantization_options` for a model: with its calibration for the LoRAs of --lora, if it comes with one."""
    options = quantization_options(args, bundle=spec.bundle)
    if options is None or not args.lora:
        return options
    from dsdiff.models.lora import calibrated_for

    return calibrated_for(options, spec, args.lora)


def merge_options(args: argparse.Namespace) -> MergeOptions | None:
    """Return the options that --ratio, --merge_schedule and their group mean; None for no merging.

    Raises ValueError for a value out of range, and for flags that would have no effect.
    """
    given = given_flags(args, TOME_FLAGS)
    if args.ratio > 0 or "merge_schedule" in given:
        options = MergeOptions(ratio=args.ratio, **given)
        if args.ratio > 0 and options.is_scheduled_throughout:
            raise ValueError(f"--merge_schedule has a ratio for every step, so --ratio {args.ratio:g} has no effect")
        return options
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"without --ratio nothing is merged, so {flags} has no effect: add --ratio 0.5, say")
    return None
