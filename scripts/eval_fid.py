#!/usr/bin/env python
"""How good are the pictures of a folder? python scripts/eval_fid.py outputs/txt2img-samples --reference shapes

Scores of the set, against a --reference: FID with its interval and its extrapolation to infinitely many pictures, KID,
Inception Score, precision and recall. Scores of pairs, against pictures of the same prompts and seeds in --paired DIR:
PSNR, SSIM, LPIPS, CLIP score; with a --reference the difference of the FIDs too, which is surer than the FIDs
themselves. PICTURES and the reference are each one of

    DIR            all pictures in it and below; of an --outdir of txt2img.py its samples
    shapes         procedural pictures with combinations that training never showed, rendered at the pictures' size
    imagenet:DIR   validation pictures of ImageNet, one folder a class: the first 5 of each
    coco:DIR       validation pictures of COCO
    NAME           a data set of torch-fidelity, such as cifar10-val
    FILE           only as reference: statistics (.npz or .safetensors), of --save_stats or of another program

All pictures must be of one size: --resize brings them there. Features are those of torch-fidelity's Inception, or of
the small reader of shapes if PICTURES or the reference are shapes; scores of the latter are named so. Features are kept
in --cache under names that carry the hashes of pictures and weights. Writes OUTDIR/scores.json and OUTDIR/scores.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.images.sources import RESIZES
from dsdiff.metrics.options import EXTRACTORS, ScoringOptions
from dsdiff.models.registry import READER

if TYPE_CHECKING:
    from dsdiff.metrics.report import Report


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("pictures", metavar="PICTURES", help="what to score (see above)")
    add = parser.add_argument_group("what to compare with").add_argument
    add("--reference", metavar="SOURCE", help="a set of real pictures (see above)")
    add("--paired", type=Path, metavar="DIR", help="pictures of the same prompts and seeds, as txt2img.py writes them")
    add("--n", type=number(int, 2), metavar="N", help="take the first N of PICTURES (default: all; of shapes 5000)")
    add("--reference_n", type=number(int, 2), metavar="N", help="take the first N of the reference")
    add("--per_class", type=number(int, 1), metavar="N", help="for imagenet: take the first N of a class (default: 5)")
    add_method_arguments(parser)
    add = parser.add_argument_group("what to write").add_argument
    add("--outdir", type=Path, default=Path("outputs/fid"), metavar="DIR", help="default: %(default)s")
    add("--name", metavar="TEXT", help="name of the row in scores.md (default: PICTURES)")
    add("--save_stats", type=Path, metavar="FILE", help="write the statistics of PICTURES, .npz or .safetensors")
    add("--cache", type=Path, default=Path("outputs/fid-cache"), metavar="DIR", help="default: %(default)s")
    add("--no_cache", action="store_true", help="keep no features and look for none")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    return parser.parse_args(argv)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the scores are computed."""
    add = parser.add_argument_group("how").add_argument
    add("--resize", choices=RESIZES, default="none", help="how to give all pictures one size (default: %(default)s)")
    add("--size", type=number(int, 8), metavar="PIXELS", help="side of the resized squares (default: that of PICTURES)")
    features = "network of the features (default: shapes if a source is shapes; what a FILE says; else inception)"
    add("--features", choices=EXTRACTORS, help=features)
    add(
        "--inception_weights",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's weights (default: those in its cache, or downloaded)",
    )
    add("--reader", type=Path, metavar="FILE", help=f"weights of the shapes features (default: {READER})")
    clip = "folder of the CLIP model for the CLIP score, or shapes (default: ViT-L/14 in Hugging Face's cache)"
    add("--clip", metavar="DIR", help=clip)
    resamples = "resamples of the bootstrap (default: %(default)s)"
    add("--resamples", type=number(int, 100), default=2000, metavar="N", help=resamples)
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of intervals and extrapolation (default: 0)")
    add("--batch_size", type=number(int, 1), default=32, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def scoring_options(args: argparse.Namespace) -> ScoringOptions:
    """Return the options that the flags mean. Raises ValueError for flags that would have no effect."""
    given = {each.name: getattr(args, each.name) for each in fields(ScoringOptions)}
    options = ScoringOptions(**{**given, "cache": None if args.no_cache else args.cache})
    options.check_for(args.pictures)
    return options


def check_folders(args: argparse.Namespace, options: ScoringOptions) -> None:
    """Raise ValueError if a folder that will be written to cannot be."""
    from ldm.fileio import check_writable

    check_writable(args.outdir)
    if options.needs_features and options.cache is not None:
        check_writable(options.cache)
    if options.save_stats is not None:
        check_writable(options.save_stats.parent)


def write(report: "Report", args: argparse.Namespace) -> None:
    """Print the table; write scores.json, and scores.md if there are scores."""
    from tqdm import tqdm

    from ldm.fileio import write_atomically

    given = {name: value for name, value in vars(args).items() if value is not None}
    content = report.to_dict(args.name) | {"arguments": given}
    texts = {"scores.json": json.dumps(content, indent=2, default=str, allow_nan=False)}
    if report.scores.by_key:
        tqdm.write(report.table())
        texts["scores.md"] = report.markdown(args.name)
    args.outdir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(args.outdir / name, lambda path, text=text: path.write_text(text + "\n", encoding="utf-8"))


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    options = scoring_options(args)
    with logs(args.verbose):
        from dsdiff.metrics.scoring import score

        check_folders(args, options)
        report = score(args.pictures, options)
        for line in report.protocol.lines():
            logger.info("%s", line)
        for note in report.scores.notes:
            logger.info("note: %s", note)
        write(report, args)


if __name__ == "__main__":
    main()
