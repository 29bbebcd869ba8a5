"""The flags that several commands share, by subject, as arguments of a parser. `flags` makes options of them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dsdiff.cli.console import number
from dsdiff.options import (
    ENGINES,
    LONG_PROMPTS,
    PRECISIONS,
    QUANT_MODES,
    RESIZES,
    SAMPLERS,
    VAES,
    EmbeddingOptions,
    LoraOptions,
)
from qdiff.config import ACT_RANGES

T = TypeVar("T")


def add_model_arguments(
    parser: argparse.ArgumentParser,
    config: str = "Stable Diffusion v1's if its checkpoint is there or --ckpt is given, else the embedded model's",
    *,
    precision: bool = True,
    lora: str | None = None,
) -> None:
    """Add the flags that choose a model.

    config: the default config, in words. precision: whether the command computes, on a device and in a precision.
    lora: what the command does with LoRAs, in words; None for a command that takes none.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, metavar="FILE", help=f"the model's yaml (default: {config})")
    group.add_argument(
        "--ckpt",
        type=Path,
        metavar="MODEL",
        help="a model: a .ckpt or .safetensors, a folder as diffusers saves it, or OWNER/NAME[@REVISION] on the hub; "
        "to draw with, also a file of scripts/export.py (default: the config's, under models/ldm)",
    )
    group.add_argument(
        "--vae_ckpt",
        type=Path,
        metavar="FILE",
        help="another autoencoder for the model: a file, a folder or a name on the hub (default: the checkpoint's)",
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the tokenizer's files (default: beside the checkpoint)"
    )
    if lora is not None:
        group.add_argument(
            "--lora",
            action="append",
            default=[],
            type=_parsed_by(LoraOptions.parse),
            metavar="FILE[:SCALE]",
            help=f"{lora}: a file of kohya's scripts, diffusers or peft, and its scale (default: 1); several add up",
        )
    if not precision:
        return
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the UNet: autocast is bfloat16, or float16 on a GPU without it; full is float32 (default: "
        "autocast on a GPU, and for quantized activations on a CPU that has bfloat16; else full)",
    )


def _parsed_by(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` as an argparse type, whose ValueErrors are messages about the flag."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how prompts are read."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt_weights",
        action=argparse.BooleanOptionalAction,
        help="brackets give weights as in stable-diffusion-webui: (word:1.2), (word) is 1.1, [word] 1/1.1, and \\( is "
        "a plain bracket; BREAK begins a new chunk (default: yes)",
    )
    group.add_argument(
        "--long_prompts",
        choices=LONG_PROMPTS,
        help="prompts of more tokens than the text encoder sees at once (75 in Stable Diffusion): chunk reads all of "
        "them, in chunks; cut reads the first chunk, and warns of what is left out (default: chunk)",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=_parsed_by(EmbeddingOptions.parse),
        metavar="FILE[:NAME]",
        help="a textual inversion (.pt, .bin, .safetensors), and the word for it in prompts (default: the token in the "
        "file, or the file's name); several may be given",
    )


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of drawing from a picture."""
    group = parser.add_argument_group("picture to draw from")
    group.add_argument(
        "--init", type=Path, required=True, metavar="FILE|DIR", help="a picture, or a folder of pictures used in turn"
    )
    group.add_argument(
        "--strength",
        type=number(float, 0, 1),
        metavar="X",
        help="share of the steps that are taken, above 0 and up to 1: the more, the less is left of the picture "
        "(default: 0.75)",
    )
    group.add_argument(
        "--resize",
        choices=RESIZES,
        help="how a picture of another size gets that of --W and --H: crop scales it to cover them and cuts off both "
        "sides, stretch changes its shape (default: crop)",
    )
    group.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="a mask of the picture's size: white is drawn anew, black stays (default: all is drawn anew)",
    )
    group.add_argument(
        "--mask_blur",
        type=number(float, 0),
        metavar="PIXELS",
        help="with --mask: radius over which the drawn part fades into the picture (default: 4)",
    )
    group.add_argument(
        "--paste",
        action=argparse.BooleanOptionalAction,
        help="with --mask: put the picture's own pixels back where the mask is black; otherwise they are the "
        "decoder's, which differ a little (default: yes)",
    )


def add_sampler_arguments(parser: argparse.ArgumentParser, *, cache: bool = True) -> None:
    """Add the flags of the sampler, of guidance, and unless `cache` is False those of cached steps."""
    group = parser.add_argument_group("sampling")
    sampler = group.add_mutually_exclusive_group()
    sampler.add_argument(
        "--sampler",
        choices=SAMPLERS,
        metavar="NAME",
        help=f"{', '.join(SAMPLERS)} (default: ddim); lcm and tcd are for models and LoRAs of few steps",
    )
    sampler.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    sampler.add_argument(
        "--dpm_solver", action="store_true", help="the same as --sampler dpm_solver, DPM-Solver++ (2M)"
    )
    group.add_argument(
        "--ddim_steps",
        type=number(int, 1),
        metavar="N",
        help="number of steps of whichever sampler; DDIM and PLMS take more, up to twice as many, if N does not divide "
        "the model's 1000 (default: the model's; 4 with lcm and tcd, which take up to 50)",
    )
    group.add_argument(
        "--ddim_eta",
        type=number(float, 0, 1),
        metavar="X",
        help="noise in each step of ddim, euler_a and tcd, in 0..1; 0 is deterministic (default: 0, 1 and 0.3)",
    )
    _add_guidance(group)
    if cache:
        _add_cache(group)


def _add_guidance(group: Any) -> None:
    group.add_argument(
        "--scale",
        type=number(float, 0),
        metavar="X",
        help="scale of guidance, eps = eps_u + scale * (eps_c - eps_u); 1 is no guidance (default: the model's; 1 with "
        "lcm and tcd, unless the model takes the scale as an input)",
    )
    share = number(float, 0, 1)
    group.add_argument(
        "--guidance_start",
        type=share,
        metavar="X",
        help="place in the steps, as a share in 0..1, before which there is no guidance; a step without guidance takes "
        "half the time (default: 0)",
    )
    group.add_argument(
        "--guidance_stop",
        type=share,
        metavar="X",
        help="place in the steps, as a share in 0..1, from which on there is no guidance (default: 1)",
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="text that guidance leads away from (default: '')")


def _add_cache(group: Any) -> None:
    group.add_argument(
        "--cache",
        type=_cache,
        metavar="N|FILE",
        help="compute the whole UNet in every N-th step only, or in the steps that a FILE of scripts/schedule_cache.py "
        "names; the other steps compute its ends, on the deep features of the last whole step (default: 1)",
    )
    add_cache_depth(group)


def _cache(text: str) -> int | Path:
    """Return a number of 1 or more, or the path of a file. Only what looks like a number is no file's name."""
    whole = text.strip().lstrip("+-").isdecimal() and not Path(text).is_file()
    return number(int, 1)(text) if whole else Path(text)


def add_cache_depth(group: Any) -> None:
    """Add --cache_depth to a group of arguments."""
    group.add_argument(
        "--cache_depth",
        type=number(int, 1),
        metavar="N",
        help="number of input blocks, and of output blocks, that are the UNet's ends in cached steps (default: 1)",
    )


def add_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the decoder, for commands that make pictures of latents."""
    group = parser.add_argument_group("decoder")
    group.add_argument(
        "--vae",
        choices=VAES,
        help="precision of the autoencoder's decoder; int8 is for files of scripts/export.py; tiny is another, small "
        "decoder, several times as fast and a little coarser (default: on a CPU int8 if the file has it, else bf16 if "
        "the CPU has it, else float32; on a GPU float32)",
    )
    group.add_argument(
        "--tiny_decoder",
        type=Path,
        metavar="FILE",
        help="for --vae tiny: TAESD's taesd_decoder, or diffusers' file of it (default: the model's, under models/ldm)",
    )
    group.add_argument(
        "--vae_tiling",
        action="store_true",
        default=None,
        help="decode in overlapping stripes, without seams: less memory for large pictures, slower",
    )


def add_noise_arguments(parser: argparse.ArgumentParser, *, batch: str = "--batch_size") -> None:
    """Add --seed and the flag of the batch size, which only txt2img.py calls --n_samples."""
    group = parser.add_argument_group("noise and batches")
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=42,
        metavar="N",
        help="picture i starts from the noise of seed + i (default: %(default)s)",
    )
    group.add_argument(
        batch, type=number(int, 1), default=3, metavar="N", help="pictures per batch (default: %(default)s)"
    )


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the size of pictures and latents."""
    group = parser.add_argument_group("size")
    group.add_argument("--H", type=number(int, 1), metavar="PIXELS", help="height (default: the model's)")
    group.add_argument("--W", type=number(int, 1), metavar="PIXELS", help="width (default: the model's)")
    group.add_argument("--C", type=number(int, 1), metavar="N", help="channels of the latents; must be the model's")
    group.add_argument("--f", type=number(int, 1), metavar="N", help="pixels per latent; must be the model's")


def add_tome_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of token merging."""
    group = parser.add_argument_group("token merging (only with a --ratio above 0 or a --merge_schedule)")
    group.add_argument(
        "--ratio",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="share of the tokens to merge, up to 1 - 1/(sx*sy); 0 merges none; up to 0.5 is wise with tiles of 2 x 2 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max_downsample",
        type=int,
        choices=[1, 2, 4, 8],
        help="merge in blocks whose feature maps have 1/N of the latents' size or more (default: 1)",
    )
    group.add_argument("--sx", type=number(int, 1), metavar="N", help="width of a tile (default: 2)")
    group.add_argument("--sy", type=number(int, 1), metavar="N", help="height of a tile (default: 2)")
    switch = argparse.BooleanOptionalAction
    group.add_argument(
        "--use_rand", action=switch, help="keep a random token of each tile; otherwise its first one (default: yes)"
    )
    group.add_argument("--merge_attn", action=switch, help="merge around self-attention (default: yes)")
    group.add_argument("--merge_crossattn", action=switch, help="merge around cross-attention (default: no)")
    group.add_argument("--merge_mlp", action=switch, help="merge around the feed-forward layers (default: no)")
    group.add_argument(
        "--proportional",
        action=switch,
        help="weigh each key in self-attention by the number of tokens merged into it: far nearer to the picture "
        "without merging, in nearly the same time (default: no, as in PyPI's tomesd)",
    )
    group.add_argument(
        "--merge_kv",
        action=switch,
        help="in self-attention, merge only keys and values, and keep every query (default: no)",
    )
    group.add_argument(
        "--merge_schedule",
        metavar="TEXT",
        help="the ratio by step: PLACE:RATIO,... with places as shares of the steps, such as 0:0.7,0.5:0.3 "
        "(before the first place, --ratio), or linear:FIRST:LAST (default: --ratio in all steps)",
    )
    group.add_argument(
        "--merge_levels",
        metavar="TEXT",
        help="the largest ratio by level, LEVEL:RATIO,... such as 1:0.6,2:0.3; level N sees the latents at 1/N of "
        "their size (default: --max_downsample)",
    )
    group.add_argument(
        "--merge_every",
        type=number(int, 1),
        metavar="N",
        help="match tokens in every N-th step only, and use the same matching in between (default: 1)",
    )
    group.add_argument(
        "--merge_share",
        action=switch,
        help="match tokens in the first block of a level only, for all its blocks (default: no)",
    )


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that take a calibrated model. They have no defaults: the file says what they do not."""
    group = parser.add_argument_group(
        "quantization (--ptq alone takes everything from the cali_ckpt; the flags of bits, range, split and mode must "
        "agree with it)"
    )
    group.add_argument("--ptq", action="store_true", default=None, help="draw with the quantized model")
    group.add_argument(
        "--cali_ckpt",
        type=Path,
        metavar="FILE",
        help="a calibration, of scripts/calibrate.py or Q-Diffusion's (default: the embedded model's)",
    )
    add_bit_arguments(
        group,
        "quantize activations (default: as the cali_ckpt has them; but no as soon as --weight_bit, --split or "
        "--quant_mode is given, as in the original work)",
    )
    group.add_argument("--quant_mode", choices=QUANT_MODES, help="how the cali_ckpt was made")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="int8 computes in integers, simulate in floats that hold integers, slower (default: int8 on CPUs that "
        "have exact integer products and NVIDIA GPUs from the A100 on, else simulate)",
    )
    group.add_argument(
        "--low_memory",
        action="store_true",
        default=None,
        help="keep weights packed, and unpack each layer when it runs: less memory, slower; for int8 with weights of 4 "
        "bits or less",
    )
    group.add_argument("--cond", action="store_true", default=None, help="require a model that takes prompts")
    group.add_argument(
        "--no_grad_ckpt", action="store_true", default=None, help="build the UNet without gradient checkpointing"
    )


def add_bit_arguments(group: Any, quant_act: str = "quantize activations as well") -> None:
    """Add the flags that say what is quantized to how many bits, without defaults. quant_act: the help of that flag."""
    bits = number(int, 2, 16)
    group.add_argument("--weight_bit", type=bits, metavar="BITS", help="bits of weights, 2..16")
    group.add_argument("--quant_act", action=argparse.BooleanOptionalAction, help=quant_act)
    group.add_argument("--act_bit", type=bits, metavar="BITS", help="bits of activations, 2..16")
    group.add_argument("--sm_abit", type=bits, metavar="BITS", help="bits of the softmax output, 2..16")
    group.add_argument(
        "--act_range",
        choices=ACT_RANGES,
        help="ranges of layers' inputs: fitted by calibration (static), or computed while drawing (dynamic)",
    )
    group.add_argument(
        "--split",
        action="store_true",
        default=None,
        help="quantize the two halves of each shortcut of the UNet separately",
    )
