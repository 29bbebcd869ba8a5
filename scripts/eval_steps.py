#!/usr/bin/env python
"""Compare ways to leave work out of steps, quality against time: python scripts/eval_steps.py --steps 50 20 8

The ways are listed in a file, configs/eval/steps.yaml or one of your own: a name, and an interval of guidance, cached
steps (cache, cache_depth), the share of whole steps of a schedule of cached ones (whole), or options of token merging.
Each is measured against drawing as the other flags say, in the same number of steps, with whatever model the flags
choose, quantized ones too:

  eps         the mean squared error of guided eps in one step, for the latents of pictures of the base
  pictures    the PSNR of pictures to those of the base, of the same prompts and noise
  attributes  the share of what captions of shapes ask for that a reader of the pictures finds
  time        the UNet calls of a picture side by side; of the model, or with --time_of sd-v1 of Stable Diffusion v1's
              UNet with random weights, whose time does not depend on them

Writes OUTDIR/steps.json, the tables as markdown, and a plot with a row for each number of steps; names on the
frontier, which no other way beats in both error and time, are bold and red. Schedules are found as
scripts/schedule_cache.py does, on other noise and, without --prompts, other captions. Schedules, figures and pictures
are kept in OUTDIR, and made only if they are not there: an interrupted run goes on with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, frontier
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.results.frontier.options import PARTS, STEPS

NUMBERS = (50, 20, 8)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    steps = f"numbers of steps, each compared by itself (default: {' '.join(map(str, NUMBERS))})"
    parser.add_argument("--steps", type=number(int, 1), nargs="+", default=list(NUMBERS), metavar="N", help=steps)
    frontier.add_arguments(parser, settings=STEPS, parts=PARTS, outdir=Path("outputs/steps"))
    arguments.add_sampler_arguments(parser, cache=False)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)
    args = parser.parse_args(argv)
    frontier.check(parser, args)
    if args.ddim_steps is not None:
        parser.error("--ddim_steps has no effect: --steps says how many steps are taken")
    return args


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    options = frontier.options_of(args)
    from dsdiff.results.frontier.report import markdown, write
    from dsdiff.results.frontier.run import compare
    from ldm.fileio import only_run_in

    with logs(args.verbose), only_run_in(options.outdir):
        costs = []
        for steps in dict.fromkeys(args.steps):
            costs.append(compare(replace(options, draw=replace(options.draw, steps=steps))))
            write(costs, options.outdir, "steps")  # what is there so far
        print(markdown(costs))


if __name__ == "__main__":
    main()
