#!/usr/bin/env python
"""Text in, picture out: python scripts/txt2img.py --prompt "a red circle on a blue background"

Draws with Stable Diffusion v1 if its checkpoint lies at models/ldm/stable-diffusion-v1/model.ckpt or
model.safetensors, else with the embedded model, which knows simple shapes. Writes OUTDIR/samples/00000.png and so on,
a grid, settings.yaml and log.txt. Each PNG holds its prompt, its seed and all settings. An OUTDIR with pictures gets
more; none is replaced.

Picture i starts from the noise of seed + i, whatever the batch size: other sizes give the same pictures up to
rounding. With --from-file, a batch takes --n_samples prompts, and the whole file is drawn --n_iter times.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import drawing
from dsdiff.cli.console import ArgumentParser, command, logs


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    drawing.add_arguments(parser, outdir="outputs/txt2img-samples")
    args = drawing.parse(parser, argv)
    with logs(args.verbose) as log:
        drawing.generate(args, argv, log)


if __name__ == "__main__":
    main()
