#!/usr/bin/env python
"""Measure what quantization costs, in one table: python scripts/eval_quantization.py

Draws the same captions from the same noise with the full-precision embedded model and with quantized ones, by rounding
to nearest (linear) and by Q-Diffusion (qdiff), and compares: PSNR to the full-precision pictures, the share of
attributes that are right (colour, shape, texture, size, count and relation together, read as by
scripts/eval_attributes.py), and the bytes of the UNet's weights. --ablation takes Q-Diffusion apart instead. --eps
compares cali_ckpts by the squared error of guided eps in one step, for latents that no calibration saw: with 32
pictures a minute or two a file on a CPU.

Calibrations and pictures are kept in OUTDIR, and made only if they are not there: an interrupted run goes on with the
same command. With torchrun the processes share the work, which is fastest with one per core:
torchrun --nproc_per_node 2 scripts/eval_quantization.py. Writes OUTDIR/quantization.json or ablation.json, the table
as markdown beside it, and a sheet of pictures, a row a variant; with --eps OUTDIR/eps.json and eps.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.calibration.options import PRESETS
from dsdiff.cli.console import ArgumentParser, command, logs, number


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--n", type=number(int, 2), default=256, metavar="N", help="pictures of each variant (default: %(default)s)")
    add("--ablation", action="store_true", help="measure what each part of Q-Diffusion is worth, in place of the table")
    add("--eps", type=Path, nargs="+", metavar="FILE", help="compare these cali_ckpts by the error of eps; one process")
    add("--preset", choices=list(PRESETS), default="fast", help="preset of the calibrations (default: %(default)s)")
    add("--outdir", type=Path, default=Path("outputs/quantization"), metavar="DIR", help="default: %(default)s")
    add("--batch_size", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of captions and noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, device: str) -> None:
    from dsdiff.images.png import write_png
    from dsdiff.results import quantization_cost as cost
    from dsdiff.results.variants import TABLE, ablation
    from ldm.fileio import check_writable
    from qdiff.distributed import only_work_in, rank

    options = cost.CostOptions(
        n=args.n,
        preset=args.preset,
        outdir=args.outdir,
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
    )
    check_writable(args.outdir)
    variants, name = (ablation(args.preset), "ablation") if args.ablation else (TABLE, "quantization")
    rows, pictures = [], []
    with only_work_in(args.outdir):
        for row, drawn in cost.costs(variants, options):
            rows.append(row)
            pictures.append(cost.shown(drawn))
        if rank() == 0:
            write(args.outdir, name, json.dumps(cost.content(rows, options), indent=2), cost.markdown(rows))
            write_png(args.outdir / f"{name}.png", cost.sheet(pictures, [row.variant for row in rows]))


def write(outdir: Path, name: str, content: str, table: str) -> None:
    """Write NAME.json and NAME.md, and print the table."""
    from ldm.fileio import write_atomically

    for suffix, text in {"json": content + "\n", "md": table + "\n"}.items():
        write_atomically(outdir / f"{name}.{suffix}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(table)


def run_eps(args: argparse.Namespace, device: str) -> None:
    from dsdiff.results.eps_error import eps_markdown, eps_rows
    from ldm.fileio import check_writable, only_run_in
    from qdiff.distributed import world_size

    if world_size() > 1:
        raise ValueError("--eps is the work of one process: start it without torchrun")
    check_writable(args.outdir)
    with only_run_in(args.outdir):
        rows = eps_rows(args.eps, n=args.n, seed=args.seed, batch_size=args.batch_size, device=device)
        write(args.outdir, "eps", json.dumps([asdict(row) for row in rows], indent=2), eps_markdown(rows))


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.eps and args.ablation:
        raise ValueError("--eps compares files, and --ablation makes them: choose one of them")
    from dsdiff.cli.launch import own_device, processes

    with logs(args.verbose), processes():
        (run_eps if args.eps else run)(args, str(own_device(args.device)))


if __name__ == "__main__":
    main()
