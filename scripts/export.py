#!/usr/bin/env python
"""Packs a calibrated model into one file that draws alone: python scripts/export.py outputs/shapes-w4a8.safetensors

The file, a bundle, holds the UNet at its few bits, autoencoder and text encoder in float16, the config, the tokenizer
and the record of its calibration. scripts/txt2img.py --ckpt FILE needs nothing else, and loads it without ever building
the float UNet. The float model's checkpoint and the cali_ckpt are read, and not changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli.arguments import add_model_arguments
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.cli.flags import model_options


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="to write, a .safetensors")
    add(
        "--cali_ckpt",
        type=Path,
        metavar="FILE",
        help="of scripts/calibrate.py, or Q-Diffusion's (default: the embedded model's)",
    )
    add("--weight_bit", type=number(int, 2, 16), metavar="BITS", help="which of the embedded model's (default: 4)")
    add(
        "--vae_pictures",
        type=number(int, 0),
        metavar="N",
        help="pictures that are drawn to fit the ranges of the decoder for --vae int8, two thirds of them in 2 or 4 "
        "steps; 0 leaves them out (default: 12)",
    )
    add("--random_weights", action="store_true", help="Stable Diffusion v1's shapes without a checkpoint, to measure")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    add_model_arguments(parser, precision=False, lora="a LoRA that the calibration was made with")
    args = parser.parse_args(argv)
    if args.file.suffix != ".safetensors":
        parser.error(f"{str(args.file)!r} must end in .safetensors")
    names = ("config", "ckpt", "tokenizer", "cali_ckpt", "weight_bit", "lora", "vae_pictures")
    given = [name for name in names if getattr(args, name) not in (None, [])]
    if args.random_weights and given:
        parser.error(f"--{given[0]} has no effect with --random_weights: leave it out")
    return args


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        from dsdiff.export import export_calibrated, export_random
        from ldm.fileio import check_writable

        check_writable(args.file.parent)
        if args.file.is_dir():
            raise ValueError(f"{str(args.file)!r} is a directory: give the name of a file")
        if args.random_weights:
            export_random(args.file)
        else:
            model = model_options(args)
            own = {} if args.vae_pictures is None else {"vae_pictures": args.vae_pictures}
            export_calibrated(args.file, model, args.cali_ckpt, args.weight_bit, lora=args.lora, **own)


if __name__ == "__main__":
    main()
