"""The flags that scripts/txt2img.py and scripts/img2img.py have in common, and the run that these mean."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser, Log, logger, number
from dsdiff.models.registry import CHECKPOINTS, STABLE_DIFFUSION
from dsdiff.prompt_rows import Row, has_rows, in_line, read_rows
from ldm.fileio import hash_ahead

if TYPE_CHECKING:
    from dsdiff import DrawSettings, Pipeline
    from dsdiff.draw_run import LaunchMark
    from dsdiff.images.init import FileRecord
    from dsdiff.options import DrawOptions
    from dsdiff.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """The prompts of a run, the rows of a file in JSON lines, the pictures to draw from, and their mask."""

    prompts: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    inits: tuple["FileRecord", ...] = ()
    mask: "FileRecord | None" = None

    @property
    def in_turn(self) -> int:
        """How many prompts or pictures are used in turn; 1 for a single one."""
        return max(len(self.prompts), len(self.inits))


# --- flags -------------------------------------------------------------------------------------------------


def add_arguments(parser: ArgumentParser, outdir: str) -> None:
    """Add the flags of both commands. outdir: the default folder for pictures."""
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", metavar="TEXT", help="the prompt of all pictures")
    add(
        "--from-file",
        type=Path,
        metavar="FILE",
        help="a text file with a prompt per line; a line of a .jsonl file may have negative, seed, steps, scale and "
        'size of its own: {"prompt": "a cat", "seed": 7, "size": [512, 768]}, where size is width and height',
    )
    add(
        "--n_iter",
        type=number(int, 1),
        metavar="N",
        help="number of batches of --prompt, or of rounds through --from-file (default: 2; 1 for a .jsonl file)",
    )
    add("--fixed_code", action="store_true", help="start all pictures from the noise of --seed")
    add = parser.add_argument_group("what to write").add_argument
    add("--outdir", type=Path, default=Path(outdir), metavar="DIR", help="default: %(default)s")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single pictures")
    add("--n_rows", type=number(int, 1), metavar="N", help="pictures in a row of the grid (default: --n_samples)")
    add("--resume", action="store_true", help="go on with the interrupted run in --outdir, which had the same flags")
    add("--verbose", action="store_true", help="show details, and tracebacks of errors")
    arguments.add_model_arguments(parser, lora="a LoRA that changes the model")
    arguments.add_prompt_arguments(parser)
    arguments.add_sampler_arguments(parser)
    arguments.add_noise_arguments(parser, batch="--n_samples")
    arguments.add_size_arguments(parser)
    arguments.add_decoder_arguments(parser)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments, which go together."""
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.from_file is None):
        parser.error("give either --prompt TEXT or --from-file FILE")
    if args.skip_grid and (args.n_rows is not None or args.skip_save):
        other = "--skip_save leaves nothing to write" if args.skip_save else "--n_rows has no effect"
        parser.error(f"{other} with --skip_grid: leave one of them out")
    if args.skip_save and args.resume:
        parser.error("--resume goes by the pictures that --skip_save does not write: leave one of them out")
    return args


# --- what to draw ------------------------------------------------------------------------------------------


def read_subjects(args: argparse.Namespace) -> Subjects:
    """Return what is to be drawn. Raises ValueError or OSError for files that hold nothing of it."""
    from dsdiff.jobs import check_text, read_prompt_file
    from ldm.modules.encoders.prompt_syntax import strong_pieces

    rows = read_rows(args.from_file, "--from-file") if has_rows(args.from_file) else ()
    if rows:
        prompts = [row.prompt for row in rows]
    else:
        prompts = [args.prompt] if args.from_file is None else read_prompt_file(args.from_file, "--from-file")
    texts = [*prompts, args.negative_prompt or "", *(row.negative or "" for row in rows)]
    check_text(texts)
    if args.prompt_weights is not False:
        for text in texts:
            strong_pieces(text)  # now, rather than when it comes to this picture
    if "init" not in args:
        return Subjects(prompts=tuple(prompts), rows=rows)
    inits, mask = _read_inits(args)
    if args.from_file is not None and len(inits) > 1 and len(inits) != len(prompts):
        raise ValueError(
            f"--init has {len(inits)} pictures and --from-file {len(prompts)} prompts: give one prompt a picture, or "
            "a single picture, or --prompt"
        )
    return Subjects(prompts=tuple(prompts), rows=rows, inits=inits, mask=mask)


def _read_inits(args: argparse.Namespace) -> tuple[tuple["FileRecord", ...], "FileRecord | None"]:
    """Return the pictures to draw from and the mask, which all have one size. Reads their headers."""
    from dsdiff.images.init import FileRecord, find_pictures, picture_size

    paths = find_pictures(args.init, "--init")
    sizes = [picture_size(path) for path in paths]
    if args.mask is None:
        return tuple(map(FileRecord.of, paths)), None
    if not args.mask.is_file():
        raise FileNotFoundError(f"--mask {str(args.mask)!r} is not there: give a black and white picture")
    own = picture_size(args.mask)
    for path, size in zip(paths, sizes, strict=True):
        if size != own:
            raise ValueError(
                f"--mask {str(args.mask)!r} has {own[0]}x{own[1]} pixels, {str(path)!r} {size[0]}x{size[1]}: they must "
                "match"
            )
    return tuple(map(FileRecord.of, paths)), FileRecord.of(args.mask)


def build_pipeline(args: argparse.Namespace) -> tuple["Pipeline", "DrawOptions"]:
    """Return the pipeline, its weights not read yet, and the options that the flags mean."""
    from dsdiff.models.spec import find_model
    from dsdiff.pipeline import Pipeline

    spec = find_model(flags.model_options(args))
    flags.check_latent_flags(args, spec)
    options = flags.draw_options(args)
    pipeline = Pipeline(
        spec,
        device=args.device,
        tokenizer=args.tokenizer,
        quantization=flags.quantization_of(args, spec),
        lora=args.lora,
        embeddings=args.embedding,
    )
    for line in (pipeline, *pipeline.notes):
        logger.info("%s", line)
    return pipeline, options


def resolve_rows(
    args: argparse.Namespace, pipeline: "Pipeline", options: "DrawOptions", rows: Sequence[Row]
) -> tuple["DrawSettings", ...]:
    """Return the settings of each row. Raises ValueError, with the number of the line, for those that cannot be."""
    settings = []
    for row in rows:
        try:
            settings.append(pipeline.resolve(row.options(options)))
        except ValueError as error:
            raise in_line(error, args.from_file, row.line, "--from-file") from error
    return tuple(settings)


def record_of(
    args: argparse.Namespace, subjects: Subjects, pipeline: "Pipeline", options: "DrawOptions"
) -> "RunRecord":
    """Return the record of the run, or of the one that --resume goes on with."""
    from dsdiff.environment import versions
    from dsdiff.jobs import next_number
    from dsdiff.record import RunRecord, resumed

    rounds = args.n_iter or (1 if subjects.rows else 2)
    single = args.from_file is None and len(subjects.inits) <= 1
    record = RunRecord(
        prompts=subjects.prompts,
        pictures=rounds * (args.n_samples if single else subjects.in_turn),
        n_iter=rounds,
        n_samples=args.n_samples,
        seed=args.seed,
        fixed_code=args.fixed_code,
        draw=pipeline.resolve(options),
        rows=subjects.rows,
        row_draws=resolve_rows(args, pipeline, options, subjects.rows),
        inits=subjects.inits,
        mask=subjects.mask,
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


# --- the run -----------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace, argv: Sequence[str], log: Log) -> None:
    """Draw what the arguments mean, and write it into --outdir. The processes of torchrun share the batches.

    Processes that torchrun restarts go on with the run that it started.
    """
    hash_ahead(_large_files(args))  # settings.yaml names files by their hashes; meanwhile torch is imported
    from dsdiff.cli.launch import own_device, processes

    with processes():
        args.device = str(own_device(args.device))
        _generate(args, argv, log)


def _large_files(args: argparse.Namespace) -> list[Path]:
    """Return the files of the model that are likely to be large, as far as they are there."""
    ckpts = [args.ckpt]
    if args.ckpt is None and args.config is None:
        ckpts = [path for path in CHECKPOINTS[STABLE_DIFFUSION] if path.is_file()][:1]
    return [path for path in (*ckpts, args.cali_ckpt) if path is not None and path.is_file()]


def _generate(args: argparse.Namespace, argv: Sequence[str], log: Log) -> None:
    from dsdiff.draw_run import LaunchMark
    from ldm.fileio import check_writable
    from qdiff.distributed import only_work_in, world_size

    if args.skip_save and world_size() > 1:
        raise ValueError("--skip_save leaves no pictures to make a grid of several processes' work from: leave it out")
    pipeline, options = build_pipeline(args)
    logger.debug("arguments: %s", argv)
    subjects = read_subjects(args)
    check_writable(args.outdir)
    check_writable(args.outdir / "samples")
    mark = LaunchMark(args.outdir)
    with only_work_in(args.outdir):  # from when its pictures get their numbers
        args.resume = args.resume or (mark.goes_on() and not args.skip_save)
        _draw(args, record_of(args, subjects, pipeline, options), pipeline, log, mark)
    logger.info("written to %s", args.outdir)


def _draw(args: argparse.Namespace, record: "RunRecord", pipeline: "Pipeline", log: Log, mark: "LaunchMark") -> None:
    from dsdiff.draw_run import DrawRun
    from dsdiff.jobs import jobs_of
    from dsdiff.memory import PeakMemory
    from qdiff.distributed import barrier, own_share, rank

    _tell_resizing(record)
    _tell_unused_embeddings(record)
    run = DrawRun(pipeline, record, keep=args.resume, save=not args.skip_save)
    batches = jobs_of(record, args.outdir)
    pending = [not run.is_done(batch) for batch in batches]
    with PeakMemory() as peak:
        if any(own_share(pending)):
            pipeline.prepare(record.draw)
        barrier()  # nothing is written before all processes have looked at the folder, and have the model
        if rank() == 0:
            (args.outdir if args.skip_save else args.outdir / "samples").mkdir(parents=True, exist_ok=True)
            log.open(args.outdir / "log.txt")
            _write_settings(record, args.outdir)
            mark.set()
        barrier()
        run.execute(args.outdir, batches, pending)
    if rank() == 0:
        mark.remove()
    logger.info("%s", run.summary())
    if run.pictures:
        logger.info("at most %s", peak)


def _write_settings(record: "RunRecord", outdir: Path) -> None:
    from dsdiff.record import SETTINGS_FILE
    from ldm.fileio import write_atomically

    text = record.to_yaml()
    write_atomically(outdir / SETTINGS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _tell_resizing(record: "RunRecord") -> None:
    """Log how the first picture to draw from, and so those of its size, come to the size drawn."""
    from dsdiff.images.init import picture_size, resize_note

    if record.inits and record.draw.init is not None:
        first, draw = record.inits[0].path, record.draw
        note = resize_note(picture_size(first), (draw.width, draw.height), record.draw.init.resize)
        if note:
            logger.info("%s: %s", first.name, note)


def _tell_unused_embeddings(record: "RunRecord") -> None:
    """Warn of each embedding whose name is in no prompt, such as a misspelt one."""
    from ldm.modules.encoders.chunks import has_word

    texts = [*record.prompts, *(draw.negative_prompt for draw in (record.draw, *record.row_draws))]
    for embedding in record.draw.embeddings:
        if not any(has_word(text, embedding.name) for text in texts):
            logger.warning("no prompt has the word %r: the embedding of this name has no effect", embedding.name)
