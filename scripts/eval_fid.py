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

# ruff: noqa: E402
import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.images.folders import (
    RESIZES,
    SHAPES,
    SHAPES_SIDE,
    FilePictures,
    PictureSet,
    choose_framing,
    open_folder,
    open_source,
    size_text,
)
from dsdiff.metrics.extractors import (
    EXTRACTORS,
    READER,
    STATISTICS,
    Extractor,
    Features,
    FeatureStore,
    Gaussian,
    choose_extractor,
    is_statistics,
    read_statistics,
    write_statistics,
)
from dsdiff.metrics.pair_scores import TITLES as PAIRED
from dsdiff.metrics.pair_scores import Pairing, add_paired_scores, pair_up
from dsdiff.metrics.set_scores import RNG_SEED, Scores, add_fid_difference, add_set_scores, cell, gaussian_of
from dsdiff.pipeline import choose_device, versions
from ldm.data.reader import STRIDE
from ldm.fileio import check_writable, write_atomically

PACKAGES = ("torch-fidelity", "torchmetrics", "torchvision", "numpy", "pillow")


# --- the command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("pictures", metavar="PICTURES", help="what to score (see above)")
    add = parser.add_argument_group("what to compare with").add_argument
    add("--reference", metavar="SOURCE", help="a set of real pictures (see above)")
    add("--paired", type=Path, metavar="DIR", help="pictures of the same prompts and seeds, as txt2img.py writes them")
    add("--n", type=number(int, 2), metavar="N", help="the first N of PICTURES (default: all; of shapes 5000)")
    add("--reference_n", type=number(int, 2), metavar="N", help="the same for the reference")
    add("--per_class", type=number(int, 1), metavar="N", help="of imagenet: the first N of each class (default: 5)")
    add = parser.add_argument_group("how").add_argument
    add("--resize", choices=RESIZES, default="none", help="how all pictures come to one size (default: %(default)s)")
    add("--size", type=number(int, 8), metavar="PIXELS", help="the side of that size (default: that of PICTURES)")
    add("--features", choices=EXTRACTORS, help="whose (default: shapes if a source is, what a FILE says, or inception)")
    add(
        "--inception_weights", type=Path, metavar="FILE", help="torch-fidelity's (default: where it keeps or gets them)"
    )
    add("--reader", type=Path, metavar="FILE", help=f"weights of the shapes features (default: {READER})")
    add("--clip", metavar="DIR", help="a CLIP model for the CLIP score (default: ViT-L/14 of Hugging Face's cache)")
    add("--resamples", type=number(int, 100), default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of intervals and extrapolation (default: 0)")
    add("--n_samples", type=number(int, 1), default=32, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add = parser.add_argument_group("what to write").add_argument
    add("--outdir", type=Path, default=Path("outputs/fid"), metavar="DIR", help="default: %(default)s")
    add("--name", metavar="TEXT", help="of the row in scores.md (default: PICTURES)")
    add("--save_stats", type=Path, metavar="FILE", help="write the statistics of PICTURES, .npz or .safetensors")
    add("--cache", type=Path, default=Path("outputs/fid-cache"), metavar="DIR", help="default: %(default)s")
    add("--no_cache", action="store_true", help="keep no features and look for none")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with an error if something needed is missing, or a flag has no effect."""
    if args.reference is None and args.paired is None and args.save_stats is None:
        parser.error("nothing to compare with: give a --reference, a folder --paired, or a file --save_stats")
    if is_statistics(args.pictures):
        parser.error(f"{args.pictures!r}: a statistics file can only be the --reference")
    if args.save_stats is not None and args.save_stats.suffix not in STATISTICS:
        parser.error(f"--save_stats {args.save_stats}: its name must end in {' or '.join(STATISTICS)}")
    statistics_only = args.reference is not None and is_statistics(args.reference)
    imagenet = any(source.startswith("imagenet:") for source in (args.pictures, args.reference or ""))
    idle = {
        "size": args.resize == "none",
        "per_class": not imagenet,
        "reference_n": args.reference is None or statistics_only,
        "features": not needs_features(args),
        "reader": not needs_features(args),
        "inception_weights": not needs_features(args),
        "clip": args.paired is None,
    }
    for name, without_effect in idle.items():
        if without_effect and getattr(args, name) is not None:
            parser.error(f"--{name} has no effect here: leave it out")


def needs_features(args: argparse.Namespace) -> bool:
    return args.reference is not None or args.save_stats is not None


# --- sources -----------------------------------------------------------------------------------------------


def open_pictures(args: argparse.Namespace) -> PictureSet:
    """PICTURES, all of one size."""
    pictures = open_source(args.pictures, what="pictures", limit=args.n, per_class=args.per_class or 5)
    return pictures.framed(choose_framing(args.resize, args.size, pictures))


def open_reference(args: argparse.Namespace, pictures: PictureSet) -> PictureSet | Gaussian:
    """A statistics file, or pictures of the size of `pictures`. ValueError if that cannot be."""
    if is_statistics(args.reference):
        return read_statistics(Path(args.reference))
    side = shapes_side(pictures) if args.reference == SHAPES else SHAPES_SIDE
    reference = open_source(
        args.reference, what="reference", limit=args.reference_n, per_class=args.per_class or 5, shapes_side=side
    ).framed(pictures.framing)
    if reference.size != pictures.size:
        raise ValueError(
            f"the pictures are {size_text(pictures.size)}, the reference is {size_text(reference.size)}: "
            "use --resize squash or center-crop"
        )
    return reference


def shapes_side(pictures: PictureSet) -> int:
    width, height = pictures.size
    if width != height:
        raise ValueError(f"the pictures are {size_text(pictures.size)}, shapes are square: use --resize center-crop")
    return width


def open_pairing(args: argparse.Namespace, pictures: PictureSet) -> Pairing:
    """`pictures` and those of --paired. ValueError if `pictures` are no files, or nothing pairs."""
    if not isinstance(pictures, FilePictures):
        raise ValueError(f"--paired pairs the files of two folders, and {args.pictures!r} is not one")
    if not args.paired.is_dir():
        raise ValueError(f"no folder to pair with at {str(args.paired)!r}: give one that txt2img.py wrote")
    return pair_up(pictures, open_folder(args.paired).framed(pictures.framing))


def open_extractor(
    args: argparse.Namespace, reference: PictureSet | Gaussian | None, pictures: PictureSet
) -> Extractor:
    """Of --features, or what the sources suggest. ValueError if it does not suit them."""
    stored = reference if isinstance(reference, Gaussian) else None
    suggested = SHAPES if SHAPES in (args.pictures, args.reference) else "inception"
    name = args.features or (stored.facts if stored else {}).get("extractor", suggested)
    if name not in EXTRACTORS:
        raise ValueError(f"the statistics are of features {name!r}: only {' and '.join(EXTRACTORS)} are known")
    for flag, of in (("reader", "shapes"), ("inception_weights", "inception")):
        if getattr(args, flag) is not None and name != of:
            raise ValueError(f"--{flag} has no effect with --features {name}: leave it out")
    if name == "shapes" and any(side % STRIDE for side in pictures.size):
        raise ValueError(
            f"the shapes features need sides that are multiples of {STRIDE}, the pictures are "
            f"{size_text(pictures.size)}: use --resize squash --size {SHAPES_SIDE}"
        )
    extractor = choose_extractor(name, reader=args.reader, inception_weights=args.inception_weights)
    if stored is not None:
        check_statistics(stored, extractor, pictures, args.reference)
    return extractor


def check_statistics(stored: Gaussian, extractor: Extractor, pictures: PictureSet, path: str) -> None:
    """ValueError if the statistics are of another protocol; a warning if nobody knows."""
    if len(stored.mu) != extractor.dimensions:
        raise ValueError(f"{path!r} is of {len(stored.mu)} features, {extractor.name} has {extractor.dimensions}")
    if not stored.facts:
        logger.warning("%s does not say how its features came about: check that it was in the same way", path)
        return
    ours = {**extractor.facts(), "size": list(pictures.size)}
    for name in ("extractor", "weights_sha256", "size"):
        if stored.facts.get(name) != ours[name]:
            raise ValueError(f"{path!r} is of another {name}, {stored.facts.get(name)}, than ours, {ours[name]}")


# --- what to show and store --------------------------------------------------------------------------------


def titles(scores: Scores, label: str) -> dict[str, str]:
    """A score's name with that of its features; those of pairs have none."""
    return {key: score.name + ("" if key in PAIRED else label) for key, score in scores.by_key.items()}


def table(scores: Scores, label: str) -> str:
    """A line a score: value, 95% interval, number of pictures or pairs, and which way is better."""
    lines = [("score", "value [95% interval] or +- spread", "n", "better")]
    names = titles(scores, label)
    lines += [(names[key], cell(score), str(score.n), score.better) for key, score in scores.by_key.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(name: str, scores: Scores, label: str) -> str:
    """A table of one row."""
    escaped = " ".join(name.split()).replace("|", "\\|")
    head = ["", *titles(scores, label).values()]
    row = [escaped, *(cell(score) for score in scores.by_key.values())]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, ["---"] * len(head), row))


def protocol_lines(protocol: dict[str, Any]) -> list[str]:
    """What was compared, and how."""
    lines = []
    for part in ("pictures", "reference", "paired"):
        facts = protocol.get(part)
        if facts:
            size = size_text(facts["size"]) if "size" in facts else "size unknown"
            lines.append(f"{part}: {facts['source']}, {facts['n'] or 'nobody knows how many'} pictures, {size}")
    lines.append(f"resize: {protocol['resize']}")
    if "features" in protocol:
        facts = protocol["features"]
        network = f"{facts['network']} of torch-fidelity {version('torch-fidelity')}"
        weights = f"weights {facts['weights_sha256'][:16]}"
        lines.append(f"features: {network}, {facts['dimensions']} dimensions, {weights}")
    return lines


def content_of(args: argparse.Namespace, protocol: dict[str, Any], scores: Scores, label: str) -> dict[str, Any]:
    """What scores.json holds."""
    names = titles(scores, label)
    return {
        "name": args.name or args.pictures,
        "scores": {key: {**asdict(score), "name": names[key]} for key, score in scores.by_key.items()},
        "fid_curve": scores.curve,
        "notes": scores.notes,
        "protocol": protocol,
        "arguments": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions() | {package: version(package) for package in PACKAGES},
    }


# --- the run -----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Scores, str]:
    """The protocol, the scores, and what stands behind the names of those of sets."""
    device = choose_device(args.device)
    pictures = open_pictures(args)
    protocol: dict[str, Any] = {"pictures": pictures.facts(), "resize": str(pictures.framing), "seed": args.seed}
    pairing, scores, label = None, Scores(), ""
    if args.paired is not None:
        pairing = open_pairing(args, pictures)
        protocol["paired"] = pairing.second.facts()
    if needs_features(args):
        label = score_sets(args, pictures, pairing, device, protocol, scores)
    if pairing is not None:
        options = {"device": device, "batch_size": args.n_samples, "resamples": args.resamples, "seed": args.seed}
        add_paired_scores(scores, pairing, clip=args.clip, **options)
    return protocol, scores, label


def score_sets(
    args: argparse.Namespace,
    pictures: PictureSet,
    pairing: Pairing | None,
    device: torch.device,
    protocol: dict[str, Any],
    scores: Scores,
) -> str:
    """Add scores against the reference, if there is one, and write the statistics of `pictures`, if asked for.

    Returns what to write behind these scores' names.
    """
    reference = open_reference(args, pictures) if args.reference is not None else None
    extractor = open_extractor(args, reference, pictures)
    protocol |= {"features": extractor.facts(), "kid_and_is_seed": RNG_SEED}
    store = FeatureStore(extractor, device, args.n_samples, None if args.no_cache else args.cache)
    features = store(pictures)
    if args.save_stats is not None:
        write_statistics(args.save_stats, described(features, pictures, extractor))
        logger.info("statistics in %s", args.save_stats)
    if extractor.name == SHAPES and pictures.size != (SHAPES_SIDE, SHAPES_SIDE):
        scores.notes.append(
            f"shapes features: of pictures of {size_text(pictures.size)}, while the reader has learnt from "
            f"{SHAPES_SIDE}x{SHAPES_SIDE}"
        )
    if reference is not None:
        protocol["reference"] = reference_facts(reference, args.reference)
        known = reference if isinstance(reference, Gaussian) else store(reference)
        add_set_scores(scores, features, known, args.seed)
        if pairing is not None:
            add_fid_difference(scores, features.chosen(pairing.firsts), partners(store, pairing), known, args.seed)
    return extractor.label


def partners(store: FeatureStore, pairing: Pairing) -> Features:
    """Of the second pictures of all pairs; kept under the name of their folder's, if all of it is paired."""
    order = sorted(pairing.seconds)
    rank = {index: place for place, index in enumerate(order)}
    return store(pairing.second.subset(order)).chosen([rank[index] for index in pairing.seconds])


def described(features: Features, pictures: PictureSet, extractor: Extractor) -> Gaussian:
    """The statistics of `pictures`, with all that a later comparison must know."""
    gaussian = gaussian_of(features)
    facts = {**pictures.facts(), "resize": str(pictures.framing), **extractor.facts()}
    return Gaussian(mu=gaussian.mu, sigma=gaussian.sigma, n=gaussian.n, facts=facts)


def reference_facts(reference: PictureSet | Gaussian, source: str) -> dict[str, Any]:
    if isinstance(reference, PictureSet):
        return reference.facts()
    return {**reference.facts, "source": f"statistics {source}", "n": reference.n}


def written_folders(args: argparse.Namespace) -> list[Path]:
    kept = [args.cache] if needs_features(args) and not args.no_cache else []
    return [args.outdir, *kept, *([args.save_stats.parent] if args.save_stats else [])]


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        for folder in written_folders(args):
            check_writable(folder)
        protocol, scores, label = run(args)
        for line in protocol_lines(protocol):
            logger.info("%s", line)
        for note in scores.notes:
            logger.info("note: %s", note)
        args.outdir.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content_of(args, protocol, scores, label), indent=2, default=str, allow_nan=False)
        write_text(args.outdir / "scores.json", content)
        if scores.by_key:
            tqdm.write(table(scores, label))
            write_text(args.outdir / "scores.md", markdown(args.name or args.pictures, scores, label))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
