"""The flags that several commands have, by subject."""

import argparse
from collections.abc import Sequence
from typing import Any

import tomesd
from dsdiff.cli.console import number

TOME_FLAGS = ("max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
ENGINES = ("int8", "simulate")
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
    "engine",
    "low_memory",
)


def add_model_arguments(
    parser: argparse.ArgumentParser,
    config: str = "Stable Diffusion v1's if its checkpoint is there or --ckpt is given, else the embedded model's",
    *,
    precision: bool = True,
) -> None:
    """config: which is the default, in words. precision: whether the command computes, on
    a device and in a precision."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", help=f"the model's yaml (default: {config})")
    group.add_argument(
        "--ckpt",
        metavar="FILE",
        help="a model's weights; where pictures are drawn, a file of scripts/export.py as well "
        "(default: the config's, under models/ldm)",
    )
    group.add_argument("--tokenizer", metavar="DIR", help="the tokenizer's files (default: beside the checkpoint)")
    if not precision:
        return
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=["autocast", "full"],
        help="of the UNet: autocast is bfloat16, or float16 on a GPU without it; full is float32 "
        "(default: autocast on a GPU, and of few-bit activations on a CPU that has bfloat16; else full)",
    )


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    sampler = group.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="sample with PLMS (default: DDIM)")
    sampler.add_argument("--dpm_solver", action="store_true", help="sample with DPM-Solver++ (2M)")
    group.add_argument(
        "--ddim_steps",
        type=number(int, 1),
        metavar="N",
        help="steps, of whatever sampler; an N that does not divide the model's 1000 makes DDIM and PLMS take more, "
        "up to twice as many (default: the model's)",
    )
    group.add_argument(
        "--ddim_eta",
        type=number(float, 0, 1),
        metavar="X",
        help="DDIM's noise in each step, 0..1 (default: 0, which is deterministic)",
    )
    group.add_argument(
        "--scale",
        type=number(float, 0),
        metavar="X",
        help="guidance, eps = eps_u + scale * (eps_c - eps_u); 1 is none (default: the model's)",
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="what guidance leads away from (default: '')")


def add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("noise and batches")
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=42,
        metavar="N",
        help="picture i starts from the noise of seed + i (default: %(default)s)",
    )
    group.add_argument(
        "--n_samples", type=number(int, 1), default=3, metavar="N", help="pictures per batch (default: %(default)s)"
    )


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size")
    group.add_argument("--H", type=number(int, 1), metavar="PIXELS", help="height (default: the model's)")
    group.add_argument("--W", type=number(int, 1), metavar="PIXELS", help="width (default: the model's)")
    group.add_argument("--C", type=number(int, 1), metavar="N", help="channels of the latents; must be the model's")
    group.add_argument("--f", type=number(int, 1), metavar="N", help="pixels per latent; must be the model's")


def add_tome_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("token merging (all but --ratio only with a --ratio above 0)")
    group.add_argument(
        "--ratio",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="part of the tokens to merge, up to 1 - 1/(sx*sy); 0 merges none, 0.5 is wise (default: %(default)s)",
    )
    group.add_argument(
        "--max_downsample",
        type=int,
        choices=[1, 2, 4, 8],
        help="merge in blocks at 1/N of the latents' size or larger (default: 1)",
    )
    group.add_argument("--sx", type=number(int, 1), metavar="N", help="width of a tile (default: 2)")
    group.add_argument("--sy", type=number(int, 1), metavar="N", help="height of a tile (default: 2)")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--use_rand", action=switch, help="draw the token that a tile keeps (default: yes)")
    group.add_argument("--merge_attn", action=switch, help="merge around self-attention (default: yes)")
    group.add_argument("--merge_crossattn", action=switch, help="merge around cross-attention (default: no)")
    group.add_argument("--merge_mlp", action=switch, help="merge around the feed-forward layers (default: no)")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that take a calibrated model; what they do not say, the cali_ckpt does."""
    group = parser.add_argument_group("quantization (with --ptq; what is not given, the cali_ckpt says)")
    group.add_argument("--ptq", action="store_true", default=None, help="draw with the quantized model")
    group.add_argument(
        "--cali_ckpt", metavar="FILE", help="of scripts/calibrate.py, or Q-Diffusion's (default: the embedded model's)"
    )
    add_bit_arguments(group)
    group.add_argument("--quant_mode", choices=["qdiff", "linear"], help="how the cali_ckpt was made")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="int8 computes in whole numbers, simulate with floats that hold them (default: int8 where it can)",
    )
    group.add_argument(
        "--low_memory",
        action="store_true",
        default=None,
        help="keep weights at their bits while drawing, and expand a layer's when it runs: less memory, slower",
    )
    group.add_argument("--cond", action="store_true", default=None, help="the model must be a conditional one")
    group.add_argument(
        "--no_grad_ckpt", action="store_true", default=None, help="build the UNet without gradient checkpointing"
    )


def add_bit_arguments(group: Any) -> None:
    """What is quantized to how many bits; the flags have no defaults."""
    bits = number(int, 2, 16)
    group.add_argument("--weight_bit", type=bits, metavar="BITS", help="of weights, 2..16")
    group.add_argument(
        "--quant_act",
        action=argparse.BooleanOptionalAction,
        help="quantize activations as well; --no-quant_act leaves them float",
    )
    group.add_argument("--act_bit", type=bits, metavar="BITS", help="of activations, 2..16")
    group.add_argument("--sm_abit", type=bits, metavar="BITS", help="of the softmax output, 2..16")
    group.add_argument(
        "--split", action="store_true", default=None, help="the halves of shortcuts are quantized by themselves"
    )


def given_flags(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Of the flags `names`, which have no default and need not be the command's, those on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def merge_options(args: argparse.Namespace) -> tomesd.MergeOptions | None:
    """What --ratio and its group ask for; None for no merging. ValueError for what is out of range or idle."""
    given = given_flags(args, TOME_FLAGS)
    if args.ratio > 0:
        return tomesd.MergeOptions(ratio=args.ratio, **given)
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"without --ratio nothing is merged, so {flags} has no effect: add --ratio 0.5, say")
    return None
