"""Make the table of results: draw each row from the same noise, score it, time it, and write the pages.

Pictures, features, timings and a calibration are kept, so that an interrupted run goes on where it stopped.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsdiff.benchmark.comparison import unet_figures
from dsdiff.calibration.run import ready_made
from dsdiff.environment import choose_device, machine, versions
from dsdiff.images.sources import SHAPES
from dsdiff.metrics.intervals import jackknife_interval
from dsdiff.metrics.options import ScoringOptions
from dsdiff.metrics.scores import Scores
from dsdiff.metrics.scoring import check_before_drawing, score
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.options import ModelOptions
from dsdiff.pipeline import Pipeline
from dsdiff.results import page
from dsdiff.results.drawing import DrawModel, DrawTask
from dsdiff.results.options import ResultsOptions
from dsdiff.results.picture_time import picture_time
from dsdiff.results.prompt_scores import add_shapes_scores
from dsdiff.results.record import Change, Results, RowResult
from dsdiff.results.table import Protocol, Row, choose_rows, read_table
from ldm.data.shapes import ShapesDataset, caption
from ldm.fileio import check_writable, write_atomically
from qdiff.checkpoint import read_cali_header
from qdiff.distributed import barrier, only_work_in, rank

logger = logging.getLogger(__name__)

SHAPES_SEED = 30_000  # of the captions: those of the reference are others


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row that is to be filled, and its pictures."""

    row: Row
    pictures: DrawTask


def make_results(options: ResultsOptions) -> Results:
    """Make the table; write results.json, results.md and results.html in options.outdir.

    Under torchrun all processes call this and share the pictures; the first one measures and writes, and the results of
    the others have no rows. Raises ValueError or OSError, as far as possible before anything is drawn, and if another
    run is in the folder.
    """
    rows, protocols = read_table(options.table)
    if options.model not in protocols:
        raise ValueError(f"table {str(options.table)!r} has no model {options.model}: it has {', '.join(protocols)}")
    protocol = protocols[options.model]
    # The rows of a model are of the weights that come with it: their calibrations fit no others.
    rows = choose_rows([*rows, *(protocol.rows if options.ckpt is None else ())], options.rows)
    spec = find_model(model_options(protocol, options), accept_bundle=False)
    check(spec, protocol, options)
    with only_work_in(options.outdir):
        return _make_results(rows, spec, protocol, options)


def _make_results(rows: Sequence[Row], spec: ModelSpec, protocol: Protocol, options: ResultsOptions) -> Results:
    prompts = prompts_of(protocol, options.pictures or protocol.pictures)
    cali_ckpt = choose_cali_ckpt(spec, protocol, options)
    tasks = plan_tasks(rows, spec, protocol, prompts, cali_ckpt, options)
    _try_quantized(tasks)
    shown = min(options.shown, len(prompts))
    results = Results(
        model=options.model,
        machine=machine(choose_device(options.device)),
        drawing=protocol.drawing,
        calibration=read_cali_header(cali_ckpt).calibration,
        batch_size=options.batch_size,
        seed=protocol.seed,
        repeats=options.repeats,
        versions=versions(),
        shown=[i * len(prompts) // shown for i in range(shown)],
        prompts=prompts,
    )
    for row in measure_rows(tasks, protocol, options):
        results.rows.append(row)
        logger.info("%s", " | ".join(page.cells(row)))
    if rank() == 0:
        write(results, options.outdir)
        logger.info("written to %s", options.outdir / "results.html")
    return results


# --- before anything is drawn ------------------------------------------------------------------------------


def model_options(protocol: Protocol, options: ResultsOptions) -> ModelOptions:
    return ModelOptions(config=protocol.config, ckpt=options.ckpt, tokenizer=options.tokenizer)


def check(spec: ModelSpec, protocol: Protocol, options: ResultsOptions) -> None:
    """Raise ValueError or OSError for what is missing, which would otherwise show only hours later."""
    scoring = scoring_options(protocol, options)
    if scoring.reference is None:
        raise ValueError(f"--model {options.model} is scored against real pictures: give --reference imagenet:DIR")
    if options.cali_ckpt is not None and not options.cali_ckpt.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(options.cali_ckpt))
    for folder in (options.outdir, options.cache):
        check_writable(folder)
    settings = Pipeline(spec, device=options.device).resolve(protocol.drawing)
    check_before_drawing(scoring, (settings.width, settings.height))


def prompts_of(protocol: Protocol, n: int) -> list[str]:
    """Return n prompts. Those of a template go through all classes of ImageNet evenly."""
    if protocol.prompts == SHAPES:
        data = ShapesDataset(n, "heldout", 128, SHAPES_SEED)
        return [caption(data.spec(i)) for i in range(n)]
    from torchvision.models import ResNet50_Weights

    classes = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [protocol.prompts.replace("{class}", classes[i * len(classes) // n]) for i in range(n)]


def choose_cali_ckpt(spec: ModelSpec, protocol: Protocol, options: ResultsOptions) -> Path:
    """Return the W4A8 calibration: the one given, the one that comes with the model, or one that is made now."""
    if options.cali_ckpt is not None:
        return options.cali_ckpt
    shipped = spec.cali_ckpts.get(4)
    if shipped is not None and shipped.is_file():
        return shipped
    calibration = protocol.calibration
    facts = json.dumps([asdict(calibration), *spec.hashes.values()], default=str)
    folder = options.outdir / f"calibration-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    own = replace(calibration, model=model_options(protocol, options), device=options.device)
    return ready_made(folder, own)


def plan_tasks(
    rows: Sequence[Row],
    spec: ModelSpec,
    protocol: Protocol,
    prompts: Sequence[str],
    cali_ckpt: Path,
    options: ResultsOptions,
) -> list[Task]:
    """Return a task for each row, in order.

    Raises ValueError if the cali_ckpt, of which the header is read, is not what a row needs.
    """
    tasks = []
    for row in rows:
        model = DrawModel(
            spec=spec,
            device=options.device,
            tokenizer=options.tokenizer,
            quantization=row.quantization(cali_ckpt),
            lora=row.loras,
        )
        pictures = DrawTask.plan(
            model,
            row.options(protocol.drawing),
            title=row.title,
            prompts=prompts,
            seed=protocol.seed,
            batch_size=options.batch_size,
            root=options.outdir / "pictures",
            name=row.key,
        )
        tasks.append(Task(row=row, pictures=pictures))
    return tasks


def _try_quantized(tasks: Sequence[Task]) -> None:
    """Load a model of each cali_ckpt, so that a damaged file or one of another model is reported now."""
    by_file = {each.cali_ckpt: task for task in tasks if (each := task.pictures.model.quantization) is not None}
    for task in by_file.values():
        pipeline = task.pictures.model.open()
        for note in pipeline.notes:
            logger.info("%s", note)
        pipeline.prepare(task.pictures.settings)


# --- the rows ----------------------------------------------------------------------------------------------


def measure_rows(tasks: Sequence[Task], protocol: Protocol, options: ResultsOptions) -> Iterator[RowResult]:
    """Draw and measure all rows, the first of which is the baseline. Only the first process measures, and yields."""
    scoring = scoring_options(protocol, options)
    base_scores = None
    for task in tasks:
        task.pictures.draw()
        barrier()
        if rank() == 0:
            row, scores = measure(task, tasks[0], base_scores, scoring, protocol, options)
            base_scores = base_scores or scores
            yield row
        barrier()


def measure(
    task: Task,
    base: Task,
    base_scores: Scores | None,
    scoring: ScoringOptions,
    protocol: Protocol,
    options: ResultsOptions,
) -> tuple[RowResult, Scores]:
    """Score and time a row. base_scores: None for the baseline itself."""
    logger.info("scoring %s", task.row.title)
    pictures = task.pictures
    paired = None if task is base else base.pictures.folder
    report = score(str(pictures.folder), replace(scoring, paired=paired))
    if task is not base:  # how far the distribution moves away from that of full precision, of the same prompts
        features = scoring.features or (SHAPES if protocol.prompts == SHAPES else None)
        own = replace(scoring, reference=str(base.pictures.folder), features=features)
        near = score(str(pictures.folder), own)
        report.scores.by_key["fid_to_base"] = replace(near.scores.by_key["fid"], name="FID to FP32's pictures")
    if protocol.prompts == SHAPES:
        add_shapes_scores(
            report.scores,
            pictures.paths,
            pictures.prompts,
            device=choose_device(options.device),
            batch_size=options.batch_size,
            resamples=scoring.resamples,
            seed=scoring.seed,
        )
    own = task.pictures.model.open()
    other = own if task is base else base.pictures.model.open()
    kept = task.pictures.folder / "unet.json"
    figures = unet_figures(own, task.pictures.settings, other, base.pictures.settings, kept, options.repeats)
    seconds = picture_time(
        own, pictures.settings, other, base.pictures.settings, pictures.folder / "picture.json", options.repeats
    )
    row = RowResult(
        row=task.row,
        n=report.protocol.pictures["n"],
        features=report.label.strip(" ()"),
        scores=report.scores.by_key,
        notes=report.scores.notes,
        protocol=report.protocol,
        engine=task.pictures.engine,
        precision=task.pictures.settings.precision,
        unet=figures,
        picture=seconds,
        pictures=str(task.pictures.folder.relative_to(options.outdir)),
        change=None if base_scores is None else fid_change(report.scores, base_scores),
    )
    return row, report.scores


def scoring_options(protocol: Protocol, options: ResultsOptions) -> ScoringOptions:
    """Return how a row is scored, without the pictures that it is paired with."""
    return replace(
        protocol.scoring,
        reference=options.reference or protocol.scoring.reference,
        inception_weights=options.inception_weights,
        cache=options.cache,
        device=options.device,
    )


def fid_change(row: Scores, base: Scores) -> Change:
    """Return by how many percent the FID is above the baseline's. Replicates leave the same tenths of pairs out."""
    own, other = row.by_key["fid"], base.by_key["fid"]
    value = 100 * (own.value / other.value - 1)
    replicates = [100 * (a / b - 1) for a, b in zip(own.replicates, other.replicates, strict=True)]
    low, high = jackknife_interval(value, replicates)
    return Change(value=value, low=low, high=high)


def write(results: Results, outdir: Path) -> None:
    """Write results.json, results.md and results.html."""
    texts = {
        "results.json": json.dumps(results.to_dict(), indent=2, allow_nan=False),
        "results.md": page.markdown(results),
        "results.html": page.page(results, outdir),
    }
    for name, text in texts.items():
        write_atomically(outdir / name, lambda path, text=text: path.write_text(text + "\n", encoding="utf-8"))
