#!/usr/bin/env python
"""Packs a calibrated model into one file that draws alone: python scripts/export.py outputs/shapes-w4a8.safetensors

The file, a bundle, holds the UNet at its few bits, autoencoder and text encoder in float16, the config, the tokenizer
and the record of its calibration. scripts/txt2img.py --ckpt FILE needs nothing else, and loads it without ever building
the float UNet. The float model's checkpoint and the cali_ckpt are read, and not changed.

--diffusers DIR writes the float model instead, as a folder that diffusers loads.
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
    add("file", type=Path, nargs="?", metavar="FILE", help="the bundle to write, a .safetensors")
    add(
        "--diffusers",
        type=Path,
        metavar="DIR",
        help="write the float model, with its LoRAs merged, as a folder that diffusers loads, in place of FILE",
    )
    add(
        "--cali_ckpt",
        type=Path,
        metavar="FILE",
        help="a calibration, of scripts/calibrate.py or Q-Diffusion's (default: the embedded model's)",
    )
    bits = "bits of weights, which choose among the embedded model's cali_ckpts (default: 4)"
    add("--weight_bit", type=number(int, 2, 16), metavar="BITS", help=bits)
    add(
        "--vae_pictures",
        type=number(int, 0),
        metavar="N",
        help="pictures to draw with the float model, to fit the ranges of the decoder for --vae int8, two thirds of "
        "them in 2 or 4 steps; 0 leaves the ranges out (default: 12)",
    )
    random = "write Stable Diffusion v1's shapes with random weights, to measure size, memory and speed"
    add("--random_weights", action="store_true", help=random)
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    add_model_arguments(parser, precision=False, lora="a LoRA that the calibration was made with")
    args = parser.parse_args(argv)
    if (args.file is None) == (args.diffusers is None):
        parser.error("give the FILE to write, or --diffusers DIR, and not both")
    if args.file is not None and args.file.suffix != ".safetensors":
        parser.error(f"{str(args.file)!r} must end in .safetensors")
    of_models = ("config", "ckpt", "tokenizer", "lora", "vae_ckpt")
    of_bundles = ("cali_ckpt", "weight_bit", "vae_pictures")
    refused = {
        "--random_weights": (*of_models, *of_bundles, "diffusers") if args.random_weights else (),
        "--diffusers, which writes a float model": of_bundles if args.diffusers is not None else (),
    }
    for flag, names in refused.items():
        given = [name for name in names if getattr(args, name) not in (None, [])]
        if given:
            parser.error(f"--{given[0]} has no effect with {flag}: leave it out")
    return args


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        from dsdiff.export import export_calibrated, export_diffusers, export_random
        from ldm.fileio import check_writable

        check_writable((args.file or args.diffusers).parent)
        if args.diffusers is not None:
            export_diffusers(args.diffusers, model_options(args), lora=args.lora)
            return
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
