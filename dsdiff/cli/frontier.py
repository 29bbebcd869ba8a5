"""The flags of commands that compare ways to draw, and the options that they become."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import number
from dsdiff.models.registry import ROOT
from dsdiff.results.frontier.options import CALLS, ENGINES, PARTS, TIME_OF, FrontierOptions


def add_arguments(parser: argparse.ArgumentParser, *, settings: Path, parts: Sequence[str], outdir: Path) -> None:
    """Add the flags of what is measured, of time, and of files, with these defaults."""
    add = parser.add_argument_group("what is measured").add_argument
    ways = f"a file that lists the ways to compare (default: {settings.relative_to(ROOT)})"
    add("--settings", type=Path, default=settings, metavar="FILE", help=ways)
    add("--names", nargs="+", default=[], metavar="NAME", help="measure only these ways of the file (default: all)")
    figures = f"measure these figures (default: {' '.join(parts)})"
    add("--parts", nargs="+", choices=PARTS, default=list(parts), help=figures)
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: captions of shapes, half held out)")
    quality = "take all but time from the JSON file of another run, measured on a GPU say; with --parts time"
    add("--quality", type=Path, metavar="FILE", help=quality)
    prompts = "number of prompts, each drawn once (default: %(default)s)"
    add("--n", type=number(int, 2), default=64, metavar="N", help=prompts)
    seed = "seed of captions and noise (default: %(default)s)"
    add("--seed", type=number(int, 0), default=0, metavar="N", help=seed)
    add = parser.add_argument_group("time").add_argument
    timed = "the UNet to time: that of the model, or Stable Diffusion v1's with random weights (default: %(default)s)"
    add("--time_of", choices=TIME_OF, default=TIME_OF[0], help=timed)
    add("--time_engine", choices=ENGINES, help=f"the engine of --time_of sd-v1 (default: {ENGINES[0]})")
    calls = f"UNet calls per measurement (default: {CALLS}; all steps of a picture if they differ)"
    add("--calls", type=number(int, 1), metavar="N", help=calls)
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="measurements of each (default: %(default)s)")
    add = parser.add_argument_group("files and batches").add_argument
    add("--outdir", type=Path, default=outdir, metavar="DIR", help="default: %(default)s")
    add("--batch_size", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    arguments.add_model_arguments(parser)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error of the parser for flags that have no effect."""
    if args.time_engine is not None and args.time_of == "model":
        parser.error("--time_engine has no effect with --time_of model, which computes as the other flags say")


def options_of(args: argparse.Namespace) -> FrontierOptions:
    """Return the options that the flags mean. Raises ValueError for those that would have no effect."""
    from dsdiff.models.spec import find_model

    model = flags.model_options(args)
    given = ("settings", "names", "parts", "tokenizer", "prompts", "n", "seed", "time_of", "calls", "repeats")
    return FrontierOptions(
        **{name: getattr(args, name) for name in (*given, "quality", "outdir", "batch_size", "device")},
        engine=args.time_engine or ENGINES[0],
        model=model,
        draw=flags.draw_options(args),
        quantization=flags.quantization_options(args, bundle=find_model(model).bundle),
    )
