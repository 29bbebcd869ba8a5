#!/usr/bin/env python
"""Text in, picture out: python scripts/txt2img.py --prompt "a red circle on a blue background"

Draws with Stable Diffusion v1 if its checkpoint lies at models/ldm/stable-diffusion-v1/model.ckpt or
model.safetensors, else with the embedded model, which knows simple shapes. Writes OUTDIR/samples/00000.png and so on,
a grid, settings.yaml and log.txt. Each PNG holds its prompt, its seed and all settings. An OUTDIR with pictures gets
more; none is replaced.

Picture i starts from the noise of seed + i, whatever the batch size: other sizes give the same pictures up to
rounding. With --from-file, a batch takes --n_samples prompts, and the file is gone through --n_iter times.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, Log, command, logger, logs, number

if TYPE_CHECKING:
    from dsdiff import DrawSettings, Pipeline
    from dsdiff.record import RunRecord


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", metavar="TEXT", help="what to draw")
    add("--from-file", type=Path, metavar="FILE", help="a prompt per line, empty lines left out")
    add("--n_iter", type=number(int, 1), default=2, metavar="N", help="batches of --prompt, or rounds of --from-file")
    add("--fixed_code", action="store_true", help="start all pictures from the noise of --seed")
    add = parser.add_argument_group("what to write").add_argument
    add("--outdir", type=Path, default=Path("outputs/txt2img-samples"), metavar="DIR", help="default: %(default)s")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single pictures")
    add("--n_rows", type=number(int, 1), metavar="N", help="pictures in a row of the grid (default: --n_samples)")
    add("--resume", action="store_true", help="go on with the last, interrupted run in --outdir, of the same flags")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    arguments.add_model_arguments(parser, lora="a LoRA that changes the model")
    arguments.add_sampler_arguments(parser)
    arguments.add_noise_arguments(parser, batch="--n_samples")
    arguments.add_size_arguments(parser)
    arguments.add_decoder_arguments(parser)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.from_file is None):
        parser.error("give either --prompt TEXT or --from-file FILE")
    if args.skip_grid and (args.n_rows is not None or args.skip_save):
        other = "--skip_save leaves nothing to write" if args.skip_save else "--n_rows has no effect"
        parser.error(f"{other} with --skip_grid: leave one of them out")
    if args.skip_save and args.resume:
        parser.error("--resume goes by the pictures that --skip_save does not write: leave one of them out")
    return args


def read_prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the prompt, or those of the file. Raises ValueError if it holds none."""
    from dsdiff.jobs import check_text, read_prompt_file

    prompts = [args.prompt] if args.from_file is None else read_prompt_file(args.from_file, "--from-file")
    check_text([*prompts, args.negative_prompt or ""])
    return tuple(prompts)


def build_pipeline(args: argparse.Namespace) -> tuple["Pipeline", "DrawSettings"]:
    """Return the pipeline, its weights not read yet, and the settings that the flags mean."""
    from dsdiff.models.spec import find_model
    from dsdiff.pipeline import Pipeline

    spec = find_model(flags.model_options(args))
    flags.check_latent_flags(args, spec)
    options = flags.draw_options(args)
    quantization = flags.quantization_options(args, bundle=spec.bundle)
    pipeline = Pipeline(spec, device=args.device, tokenizer=args.tokenizer, quantization=quantization, lora=args.lora)
    for line in (pipeline, *pipeline.notes):
        logger.info("%s", line)
    return pipeline, pipeline.resolve(options)


def record_of(
    args: argparse.Namespace, prompts: tuple[str, ...], pipeline: "Pipeline", settings: "DrawSettings"
) -> "RunRecord":
    from dsdiff.environment import versions
    from dsdiff.jobs import next_number
    from dsdiff.record import RunRecord, resumed

    record = RunRecord(
        prompts=prompts,
        pictures=args.n_iter * (args.n_samples if args.from_file is None else len(prompts)),
        n_iter=args.n_iter,
        n_samples=args.n_samples,
        seed=args.seed,
        fixed_code=args.fixed_code,
        draw=settings,
        spec=pipeline.spec,
        device=pipeline.device.type,
        tokenizer=None if args.tokenizer is None else str(args.tokenizer),
        skip_grid=args.skip_grid,
        n_rows=args.n_rows or args.n_samples,
        first=next_number(args.outdir / "samples", ""),
        first_grid=next_number(args.outdir, "grid-"),
        versions=versions(),
    )
    return resumed(record, args.outdir) if args.resume else record


def generate(args: argparse.Namespace, argv: Sequence[str], log: Log) -> None:
    from dsdiff.draw_run import DrawRun
    from dsdiff.environment import peak_memory
    from dsdiff.jobs import jobs_of
    from dsdiff.record import SETTINGS_FILE
    from ldm.fileio import check_writable, write_atomically

    pipeline, settings = build_pipeline(args)
    logger.debug("arguments: %s", argv)
    prompts = read_prompts(args)
    check_writable(args.outdir)
    check_writable(args.outdir / "samples")
    record = record_of(args, prompts, pipeline, settings)
    run = DrawRun(pipeline, record, keep=args.resume, save=not args.skip_save)
    batches = jobs_of(record, args.outdir)
    pending = [not run.is_done(batch) for batch in batches]
    if any(pending):
        pipeline.prepare(settings)  # nothing is written before the model is there
    (args.outdir if args.skip_save else args.outdir / "samples").mkdir(parents=True, exist_ok=True)
    log.open(args.outdir / "log.txt")
    text = record.to_yaml()
    write_atomically(args.outdir / SETTINGS_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    run.execute(args.outdir, batches, pending)
    logger.info("%s", run.summary())
    if run.pictures and (peak := peak_memory()) is not None:
        logger.info("at most %.2f GB of memory", peak / 1e9)
    logger.info("written to %s", args.outdir)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose) as log:
        generate(args, argv, log)


if __name__ == "__main__":
    main()
