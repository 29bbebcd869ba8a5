#!/usr/bin/env python
"""Picture and text in, picture out: python scripts/img2img.py --init FILE --prompt "a red circle on a blue background"

The picture gets noise, and the last --strength of the steps take it away again, led by the prompt. With --mask, only
what is white in the mask is drawn anew, by any checkpoint that draws: what is black is put back after each step, and
its pixels at the end. A folder's pictures are used in turn, --n_iter times, with --prompt, or each with the line of
--from-file that has its number.

Pictures of another size than --W and --H (default: the model's) are scaled to cover it and cropped at the centre, or
stretched with --resize stretch; the mask, which must have its picture's size, alike. Else the flags, what is written
and what it depends on are those of scripts/txt2img.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, drawing
from dsdiff.cli.console import ArgumentParser, command, logs


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    arguments.add_init_arguments(parser)
    drawing.add_arguments(parser, outdir="outputs/img2img-samples")
    args = drawing.parse(parser, argv)
    with logs(args.verbose) as log:
        drawing.generate(args, argv, log)


if __name__ == "__main__":
    main()
