#!/usr/bin/env python
"""Compare ways to merge tokens, quality against time: python scripts/eval_merging.py

The ways are listed in a file, configs/eval/merging.yaml or one of your own: a name, and the options of the flags of
token merging. Each is measured against no merging, with whatever model the flags choose, quantized ones too:

  eps         the mean squared error of guided eps in one step, for the latents of pictures drawn without merging
  pictures    the PSNR of pictures to those without merging, of the same prompts and noise
  attributes  (not by default) the share of what captions of shapes ask for that a reader of the pictures finds
  time        UNet calls side by side, spread over the steps of a picture; of the model, or with --time_of sd-v1 of
              Stable Diffusion v1's UNet with random weights, whose time does not depend on them

Writes OUTDIR/merging.json, the table as markdown, and a plot; names on the frontier, which no other way beats in both
error and time, are bold and red. Figures and pictures are kept in OUTDIR, and made only if they are not there: an
interrupted run goes on with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, frontier
from dsdiff.cli.console import ArgumentParser, command, logs
from dsdiff.results.frontier.options import MERGING


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parts = ("eps", "pictures", "time")
    frontier.add_arguments(parser, settings=MERGING, parts=parts, outdir=Path("outputs/merging"))
    arguments.add_sampler_arguments(parser)
    arguments.add_quantization_arguments(parser)
    args = parser.parse_args(argv)
    frontier.check(parser, args)
    return args


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    options = frontier.options_of(args)
    from dsdiff.results.frontier.report import markdown, write
    from dsdiff.results.frontier.run import compare
    from ldm.fileio import only_run_in

    with logs(args.verbose), only_run_in(options.outdir):
        costs = [compare(options)]
        write(costs, options.outdir, "merging")
        print(markdown(costs))


if __name__ == "__main__":
    main()
