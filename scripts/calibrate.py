#!/usr/bin/env python
"""Makes a cali_ckpt, few-bit weights and activations: python scripts/calibrate.py --quant_act --split --cond

Draws pictures of a list of prompts with the float model, records the inputs of its UNet, and fits a quantized UNet to
the same outputs: first the rounding of all weights (AdaRound unit by unit, or GPTQ layer by layer, which is much
faster), then the ranges of all activations, then their step sizes (LSQ, unit by unit). Writes OUTDIR/cali.safetensors,
which scripts/txt2img.py --ptq --cali_ckpt draws with, and OUTDIR/report.json, the error of each unit before and after.
Finished steps are kept: an interrupted calibration goes on with --resume, and ends with the same file. Before anything
is drawn or learned it estimates time, memory and disk, and refuses what cannot fit.

--preset sets the effort: `fast` takes minutes on a CPU for the embedded model, `paper` has Q-Diffusion's numbers. Flags
override it; docs/usage.md has those for Stable Diffusion v1 on a CPU. --quant_mode linear learns nothing: weights are
rounded to nearest, ranges are minimum and maximum.

With torchrun the processes share the work: torchrun --nproc_per_node 2 scripts/calibrate.py ...
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.calibration.options import DEFAULT_CACHE_GB, FORMATS, CalibrationOptions
from dsdiff.cli import arguments, calibration, flags
from dsdiff.cli.console import ArgumentParser, command, logs, number


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. They have no defaults but those of groups: CalibrationOptions has them."""
    parser = ArgumentParser(__doc__)
    calibration.add_arguments(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--outdir", type=Path, metavar="DIR", help=f"default: {CalibrationOptions.outdir}")
    add(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the interrupted calibration in --outdir, which had the same flags",
    )
    add("--format", choices=FORMATS, help="format of the cali_ckpt; qdiff is Q-Diffusion's .pth (default: dsdiff)")
    add(
        "--cache_gb",
        type=number(float, 0),
        metavar="GB",
        help=f"GiB of activations to keep in memory; the rest goes to OUTDIR (default: {DEFAULT_CACHE_GB:g})",
    )
    add(
        "--seed",
        type=number(int, 0, 2**31 - 1),
        metavar="N",
        help=f"seed of the pictures of the data and of all random choices (default: {CalibrationOptions.seed})",
    )
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    arguments.add_model_arguments(parser, lora="a LoRA to merge first, which drawing then needs too")
    arguments.add_sampler_arguments(parser)
    arguments.add_tome_arguments(parser)
    return parser.parse_args(argv)


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
