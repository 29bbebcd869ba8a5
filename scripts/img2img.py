#!/usr/bin/env python
"""Picture and text in, picture out: python scripts/img2img.py --init FILE --prompt "a red circle on a blue background"

Adds noise to the picture, and removes it again in the last part of the steps (their share --strength), guided by the
prompt. With --mask, only what is white in the mask is drawn anew. Any checkpoint can do it: what is black is put back
after each step, and its pixels at the end. The pictures of a folder are used in turn, --n_iter times: all with
--prompt, or the first with the first line of --from-file, and so on.

Pictures of another size than --W and --H (default: the model's) are scaled to cover it and cropped at the centre, or
stretched with --resize stretch. The mask must have its picture's size, and is changed in the same way. All other flags,
and what is written, are as in scripts/txt2img.py.
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
