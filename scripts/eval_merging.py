#!/usr/bin/env python
"""Compare ways to merge tokens, quality against time: python scripts/eval_merging.py

The ways are listed in a file, configs/eval/merging.yaml or one of your own: a name, and the options of the flags of
token merging. Each is measured against no merging, with whatever model the flags choose, quantized ones too:

  eps       the mean squared error of guided eps in one step, for the latents of pictures drawn without merging
  pictures  the PSNR of pictures to those without merging, of the same prompts and noise
  time      UNet calls side by side, spread over the steps of a picture; of the model, or with --time_of sd-v1 of
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

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.models.registry import ROOT
from dsdiff.results.merging.options import ENGINES, PARTS, SETTINGS, TIME_OF, MergingCostOptions


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    default = SETTINGS.relative_to(ROOT)
    add("--settings", type=Path, default=SETTINGS, metavar="FILE", help=f"the ways to merge (default: {default})")
    add("--names", nargs="+", default=[], metavar="NAME", help="measure these of the settings (default: all)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these figures (default: all)")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line (default: captions of shapes, half held out)")
    add("--n", type=number(int, 2), default=64, metavar="N", help="prompts, each drawn once (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of captions and noise (default: %(default)s)")
    add = parser.add_argument_group("time").add_argument
    add("--time_of", choices=TIME_OF, default=TIME_OF[0], help="whose calls are timed (default: %(default)s)")
    add("--time_engine", choices=ENGINES, help=f"what computes sd-v1 (default: {ENGINES[0]})")
    add("--calls", type=number(int, 1), default=12, metavar="N", help="UNet calls a measurement (default: %(default)s)")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="measurements of each (default: %(default)s)")
    add = parser.add_argument_group("files and batches").add_argument
    add("--outdir", type=Path, default=Path("outputs/merging"), metavar="DIR", help="default: %(default)s")
    add("--batch_size", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    arguments.add_model_arguments(parser)
    arguments.add_sampler_arguments(parser)
    arguments.add_quantization_arguments(parser)
    args = parser.parse_args(argv)
    if args.time_engine is not None and args.time_of == "model":
        parser.error("--time_engine has no effect with --time_of model, which computes as the other flags say")
    return args


def options_of(args: argparse.Namespace) -> MergingCostOptions:
    """Return the options that the flags mean. Raises ValueError for those that would have no effect."""
    from dsdiff.models.spec import find_model

    model = flags.model_options(args)
    given = ("settings", "names", "parts", "tokenizer", "prompts", "n", "seed", "time_of", "calls", "repeats")
    return MergingCostOptions(
        **{name: getattr(args, name) for name in (*given, "outdir", "batch_size", "device")},
        engine=args.time_engine or ENGINES[0],
        model=model,
        draw=flags.draw_options(args),
        quantization=flags.quantization_options(args, bundle=find_model(model).bundle),
    )


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    options = options_of(args)
    from dsdiff.results.merging.report import markdown, write
    from dsdiff.results.merging.run import compare

    with logs(args.verbose):
        costs = compare(options)
        write(costs, options.outdir)
        print(markdown(costs))


if __name__ == "__main__":
    main()
