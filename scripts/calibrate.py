#!/usr/bin/env python
"""Makes a cali_ckpt, few-bit weights and activations: python scripts/calibrate.py --quant_act --split --cond

Draws pictures of a list of prompts with the float model, keeps what its UNet is given on the way, and teaches the
quantized UNet to give the same: first the rounding of all weights (AdaRound unit by unit, or GPTQ layer by layer, which
is much faster), then the ranges of all activations, then their step sizes (LSQ, unit by unit). Writes
OUTDIR/cali.safetensors, which scripts/txt2img.py --ptq --cali_ckpt draws with, and OUTDIR/report.json, the error of
each unit before and after. What was finished is kept: an interrupted calibration goes on with --resume, and ends with
the same file.

--preset says how much: `fast` takes minutes on a CPU for the embedded model, `paper` has Q-Diffusion's numbers. Flags
override it. --quant_mode linear learns nothing: weights are rounded to nearest, ranges are minimum and maximum.

With torchrun the processes share the work: torchrun --nproc_per_node 2 scripts/calibrate.py ...
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.calibration.options import FORMATS, PRESETS, CalibrationOptions
from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.options import QUANT_MODES
from qdiff.config import ROUNDINGS


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. They have no defaults but those of groups: CalibrationOptions has them."""
    parser = ArgumentParser(__doc__)
    add_quantization_flags(parser)
    add_data_flags(parser)
    add_learning_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--outdir", type=Path, metavar="DIR", help=f"default: {CalibrationOptions.outdir}")
    add(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the interrupted calibration in --outdir, of the same flags",
    )
    add("--format", choices=FORMATS, help="of the cali_ckpt; qdiff is Q-Diffusion's .pth (default: dsdiff)")
    add("--cache_gb", type=number(float, 0), metavar="GB", help="activations kept in memory, the rest on disk")
    add("--seed", type=number(int, 0, 2**31 - 1), metavar="N", help=f"default: {CalibrationOptions.seed}")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    arguments.add_model_arguments(parser, lora="a LoRA to merge first, which drawing then needs too")
    arguments.add_sampler_arguments(parser)
    arguments.add_tome_arguments(parser)
    return parser.parse_args(argv)


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization (default: 4-bit weights)")
    arguments.add_bit_arguments(group)
    group.add_argument(
        "--quant_mode",
        choices=QUANT_MODES,
        help="qdiff learns; linear, the baseline, rounds to nearest between minimum and maximum (default: qdiff)",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration data").add_argument
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: cali_prompts.txt beside the config)")
    add("--data_path", type=Path, metavar="FILE", help="ready data, of an earlier run or in Q-Diffusion's layout")
    add("--cali_st", type=number(int, 1), metavar="N", help="timesteps, spread over the trajectory")
    add("--cali_n", type=number(int, 1), metavar="N", help="pictures at each timestep")
    add("--cond", action="store_true", default=None, help="both branches of guidance: with prompt and without")
    add(
        "--num_samples",
        type=number(int, 1),
        metavar="N",
        help="take so many of all samples, at random (default: all)",
    )


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning (defaults: those of --preset, then Q-Diffusion's)").add_argument
    add("--preset", choices=list(PRESETS), help=f"default: {CalibrationOptions.preset}")
    add("--batch_size", type=number(int, 1), metavar="N", help="samples a step, over all processes")
    add("--rounding", choices=ROUNDINGS, help="of weights: learned, by second-order sums, or to nearest")
    add("--samples_w", type=number(int, 1), metavar="N", help="samples for GPTQ (default: 128)")
    add(
        "--damp",
        type=number(float, 0),
        metavar="X",
        help="share added to the diagonal of GPTQ's Hessian (default: 0.01)",
    )
    add("--no_act_order", action="store_true", default=None, help="GPTQ rounds columns in their own order")
    add("--iters_w", type=number(int, 0), metavar="N", help="steps of AdaRound, a unit; 0 rounds to nearest")
    add("--iters_a", type=number(int, 0), metavar="N", help="steps of LSQ, a unit; 0 leaves ranges as fitted")
    add("--lr_w", type=number(float, 0), metavar="X", help="learning rate of AdaRound")
    add("--lr", type=number(float, 0), metavar="X", help="learning rate of LSQ, on the logarithm of step sizes")
    add("--p", type=number(float, 1), metavar="X", help="norm of LSQ's loss (default: 2.4)")
    add("--weight", type=number(float, 0), metavar="X", help="of the rounding regulariser (default: 0.01)")
    add("--b_start", type=number(float, 1), metavar="X", help="its exponent at first (default: 20)")
    add("--b_end", type=number(float, 1), metavar="X", help="its exponent at last (default: 2)")
    add("--warmup", type=number(float, 0, 1), metavar="X", help="share of the steps without it (default: 0.2)")
    add(
        "--mixed_act",
        type=number(float, 0),
        metavar="N|SHARE",
        help="more bits for the N most sensitive inputs, or for the fewest that cause SHARE (below 1) of the error",
    )
    add("--mixed_act_bit", type=number(int, 9, 16), metavar="BITS", help="of these inputs, 9..16 (default: 12)")
    add("--running_stat", action="store_true", default=None, help="ranges by running averages of minimum and maximum")
    add("--sym", action="store_true", default=None, help="feed units (GPTQ: layers) the float model's inputs")
    add(
        "--no_grad_ckpt",
        action="store_true",
        default=None,
        help="no gradient checkpointing: faster, more memory",
    )


def options_of(args: argparse.Namespace) -> CalibrationOptions:
    """Return the options that the flags mean. Raises ValueError for flags that would have no effect."""
    merge = flags.merge_options(args)  # of the calibration alone: the data is drawn without
    draw = replace(flags.draw_options(args), merge=None)
    names = {field.name for field in fields(CalibrationOptions)} - {"model", "lora", "draw", "merge"}
    given = flags.given_flags(args, sorted(names))
    lora = tuple(args.lora)
    return CalibrationOptions(model=flags.model_options(args), lora=lora, draw=draw, merge=merge, **given)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    options = options_of(args)
    from dsdiff.calibration.run import calibrate
    from dsdiff.cli.launch import own_device, processes

    with logs(args.verbose), processes():
        calibrate(replace(options, device=str(own_device(options.device))))


if __name__ == "__main__":
    main()
