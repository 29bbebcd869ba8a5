#!/usr/bin/env python
"""The table of results, by one command: python scripts/reproduce.py

For each row of configs/eval/table.yaml (few bits, fewer tokens, both) the same prompts are drawn from the same noise,
scored against the reference (FID, KID, precision, recall), against the full-precision pictures (PSNR, SSIM, the FID to
them, and by how much the FID to the reference is higher) and against the prompts (CLIP score, attributes that are
right), and the UNet is timed side by side with the full-precision one. All scores have intervals. Writes
OUTDIR/results.json, results.md and results.html, which needs nothing beside it.

--model sd-v1 does the same with Stable Diffusion v1.4 after the original's protocol: it needs the checkpoint,
--reference imagenet:DIR, and torch-fidelity's Inception weights. Without --cali_ckpt the one that comes with the model
is taken, or one is made first, in OUTDIR. Rows with a calibration of their own, such as W4A8-dynamic, are of the
weights that come with the model, and left out with --ckpt.

Pictures are kept in OUTDIR/pictures and drawn only if they are not there: an interrupted run goes on with the same
command. With torchrun the processes share the pictures: torchrun --nproc_per_node 2 scripts/reproduce.py
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.models.registry import ROOT
from dsdiff.results.options import MODELS, TABLE, ResultsOptions


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    add("--model", choices=MODELS, default=MODELS[0], help="the model of the table (default: %(default)s)")
    rows = f"the rows, and how they are drawn and scored (default: {TABLE.relative_to(ROOT)})"
    add("--table", type=Path, default=TABLE, metavar="FILE", help=rows)
    add(
        "--rows",
        nargs="+",
        default=(),
        metavar="ROW",
        help="only these rows, beside the baseline, such as FP32-0.5 W4A8-dynamic-0.5 (default: all)",
    )
    add("--pictures", type=number(int, 2), metavar="N", help="pictures per row (default: the table's)")
    add("--reference", metavar="SOURCE", help="real pictures, as for eval_fid.py (default: the table's)")
    add = parser.add_argument_group("files").add_argument
    add("--ckpt", type=Path, metavar="FILE", help="the model's weights (default: under models/ldm)")
    add("--tokenizer", type=Path, metavar="DIR", help="the tokenizer's files (default: beside the checkpoint)")
    add("--cali_ckpt", type=Path, metavar="FILE", help="the calibration of W4A8 (default: the model's, or a new one)")
    weights = "torch-fidelity's weights (default: those in its cache, or downloaded)"
    add("--inception_weights", type=Path, metavar="FILE", help=weights)
    add("--outdir", type=Path, default=Path("outputs/results"), metavar="DIR", help="default: %(default)s")
    add("--cache", type=Path, default=Path("outputs/fid-cache"), metavar="DIR", help="features; default: %(default)s")
    add = parser.add_argument_group("how").add_argument
    add("--batch_size", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="repeats of timings (default: %(default)s)")
    add("--shown", type=number(int, 1), default=6, metavar="N", help="prompts in the report (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from dsdiff.cli.launch import own_device, processes
    from dsdiff.results.page import markdown
    from dsdiff.results.run import make_results
    from qdiff.distributed import rank

    with logs(args.verbose), processes():
        given = {each.name: getattr(args, each.name) for each in fields(ResultsOptions)}
        results = make_results(ResultsOptions(**{**given, "device": str(own_device(args.device))}))
        if rank() == 0:
            print(markdown(results))


if __name__ == "__main__":
    main()
