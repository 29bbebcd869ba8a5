#!/usr/bin/env python
"""Do the pictures show what their captions ask for? python scripts/eval_attributes.py --n 256

Draws captions of the procedural data set, generates their pictures with the embedded model, reads these with a small
detector, and counts how often colour, shape, texture, size, number of objects and relation are right. What a caption
leaves open is not judged. Beside the generated pictures stand two ceilings: `rendered`, real pictures of the same
captions, and `autoencoder`, these after encoding and decoding. The captions of split `test` hold combinations that
training showed, each caption of `heldout` at least one that it did not. --seed draws the captions, and the noise.

With --images DIR it judges the PNGs of a folder instead, as scripts/txt2img.py writes them (prompt inside).
Writes attributes.json (figures, and what they were got with), a sheet of pictures with their captions, and
prompts-SPLIT.txt for txt2img's --from-file. Pictures are kept in OUTDIR/pictures, and drawn only if they are not there:
an interrupted run goes on with the same command.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.models.registry import EMBEDDED, READER

if TYPE_CHECKING:
    from dsdiff.metrics.attributes import Judged
    from dsdiff.pipeline import Pipeline
    from dsdiff.results.drawing import DrawModel

WITH_IMAGES = ("images", "outdir", "reader", "device", "batch_size", "verbose")  # flags that --images leaves a meaning


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what to judge").add_argument
    add("--n", type=number(int, 1), default=256, metavar="N", help="captions of each split (default: %(default)s)")
    add("--captions", default="both", choices=["test", "heldout", "both"], help="split to judge (default: %(default)s)")
    add("--images", type=Path, metavar="DIR", help="judge the PNGs of DIR instead of generating")
    add("--reader", type=Path, default=READER, metavar="FILE", help="the detector's weights (default: %(default)s)")
    add("--outdir", type=Path, default=Path("outputs/attributes"), metavar="DIR", help="default: %(default)s")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    config = "the embedded model's; no other knows the captions"
    arguments.add_model_arguments(parser, config, lora="a LoRA to draw with")
    arguments.add_sampler_arguments(parser)
    arguments.add_noise_arguments(parser)
    arguments.add_decoder_arguments(parser)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)
    parser.set_defaults(seed=0, batch_size=16)
    args = parser.parse_args(argv)
    if args.images is not None:
        refuse_generation(parser, argv, args)
    return args


def refuse_generation(parser: ArgumentParser, argv: Sequence[str], args: argparse.Namespace) -> None:
    """Leave with an error if a flag stands on the command line that --images gives no meaning."""
    without_defaults = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = [name for name, value in vars(parser.parse_args(argv, without_defaults)).items() if value is not None]
    idle = [name for name in given if name not in WITH_IMAGES]
    if idle:
        names = ", ".join(f"--{name}" for name in idle)
        parser.error(f"with --images nothing is generated, so {names} has no effect: leave it out")


def build_model(args: argparse.Namespace) -> tuple["DrawModel", "Pipeline"]:
    """Return the model that the flags mean, and its pipeline, whose weights are not read yet."""
    from dsdiff.models.bundle import is_bundle
    from dsdiff.models.spec import find_model
    from dsdiff.results.drawing import DrawModel

    options = flags.model_options(args)
    if options.config is None and not (options.ckpt is not None and is_bundle(options.ckpt)):
        options = replace(options, config=EMBEDDED)
    spec = find_model(options)
    quantization = flags.quantization_of(args, spec)
    model = DrawModel(
        spec=spec, device=args.device, tokenizer=args.tokenizer, quantization=quantization, lora=tuple(args.lora)
    )
    pipeline = model.open()
    for line in (pipeline, *pipeline.notes):
        logger.info("%s", line)
    return model, pipeline


def report(judged: "Judged", outdir: Path) -> dict[str, dict[str, Any]]:
    """Print a split's table and write its sheet and captions; return its figures."""
    from tqdm import tqdm

    tqdm.write(judged.table() + "\n")
    judged.write(outdir)
    return judged.figures()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of attributes.json: arguments, files by their hashes, versions, figures."""
    from dsdiff.environment import choose_device, versions
    from dsdiff.metrics.attributes import judge_folder
    from dsdiff.results.attributes import judge_model
    from ldm.data.reader import ShapesReader
    from ldm.fileio import file_sha256

    reader = ShapesReader.from_file(args.reader).to(choose_device(args.device))
    given = {name: value for name, value in vars(args).items() if value is not None}
    facts = {"arguments": given, "reader_sha256": file_sha256(args.reader), "versions": versions()}
    if args.images is not None:
        judged = judge_folder(args.images, reader, args.batch_size)
        return facts | {"figures": {"images": report(judged, args.outdir)}}
    model, pipeline = build_model(args)
    settings = pipeline.resolve(flags.draw_options(args))
    facts |= {"options": asdict(settings), **pipeline.spec.hashes}
    pipeline.prepare(settings)  # nothing is written before the model is there
    figures = {}
    for split in ("test", "heldout") if args.captions == "both" else (args.captions,):
        how = {name: getattr(args, name) for name in ("n", "seed", "batch_size", "outdir")}
        figures[split] = report(judge_model(model, pipeline, settings, split=split, reader=reader, **how), args.outdir)
    return facts | {"figures": figures}


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        from ldm.fileio import check_writable, only_run_in, write_atomically

        check_writable(args.outdir)
        with only_run_in(args.outdir):
            content = json.dumps(run(args), indent=2, default=str) + "\n"
            write_atomically(args.outdir / "attributes.json", lambda path: path.write_text(content, encoding="utf-8"))


if __name__ == "__main__":
    main()
