#!/usr/bin/env python
"""The table of results, by one command: python scripts/reproduce.py

For each row of configs/eval/table.yaml (few bits, fewer tokens, both) the same prompts are drawn from the same noise,
scored against the reference (FID, KID, precision, recall) and against the full-precision pictures (PSNR, SSIM, by how
much the FID is higher, with its interval), and the UNet is timed side by side with the full-precision one. Writes
OUTDIR/results.json, results.md and results.html, which needs nothing beside it.

--model sd-v1 does the same with Stable Diffusion v1.4 after the original's protocol: it needs the checkpoint,
--reference imagenet:DIR, and torch-fidelity's Inception weights. Without --cali_ckpt the one that comes with the model
is taken, or one is made first, in OUTDIR.

Pictures are kept in OUTDIR/pictures and drawn only if they are not there: an interrupted run goes on with the same
command. With torchrun the processes share the pictures: torchrun --nproc_per_node 2 scripts/reproduce.py
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import ResNet50_Weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.benchmark.comparison import unet_figures
from dsdiff.benchmark.timing import machine
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.cli.launch import own_device, processes
from dsdiff.images.folders import SHAPES, choose_framing, open_source, size_text
from dsdiff.jobs import draw_missing, model_of, options_of
from dsdiff.metrics.extractors import choose_extractor, is_statistics, read_statistics
from dsdiff.metrics.set_scores import T_QUANTILE, Scores, jackknife_error
from dsdiff.pipeline import SamplingOptions, choose_device, versions
from dsdiff.results import page as report
from dsdiff.results.table import TABLE, Protocol, Row, read_table
from ldm.data.shapes import ShapesDataset, caption
from ldm.fileio import check_writable, write_atomically
from qdiff.checkpoint import read_cali_header
from qdiff.distributed import barrier, rank
from scripts import calibrate, eval_fid

SHAPES_SEED = 30_000  # of the captions: those of the reference are others
CALIBRATION = ["--weight_bit", "4", "--quant_act", "--act_bit", "8", "--sm_abit", "16", "--split", "--cond"]
MODELS = ("embedded", "sd-v1")


# --- the command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add("--table", type=Path, default=TABLE, metavar="FILE", help=f"default: {TABLE.relative_to(ROOT)}")
    add("--pictures", type=number(int, 2), metavar="N", help="pictures a row (default: the table's)")
    add("--reference", metavar="SOURCE", help="as of eval_fid.py (default: the table's)")
    add("--ckpt", metavar="FILE", help="the model's weights (default: under models/ldm)")
    add("--tokenizer", metavar="DIR", help="the tokenizer's files (default: beside the checkpoint)")
    add(
        "--cali_ckpt",
        type=Path,
        metavar="FILE",
        help="of W4A8 (default: the model's, or a new one)",
    )
    add("--inception_weights", metavar="FILE", help="torch-fidelity's (default: where it keeps or gets them)")
    add("--outdir", type=Path, default=Path("outputs/results"), metavar="DIR", help="default: %(default)s")
    add(
        "--cache", type=Path, default=Path("outputs/fid-cache"), metavar="DIR", help="of features; default: %(default)s"
    )
    add("--n_samples", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="of timings (default: %(default)s)")
    add(
        "--shown",
        type=number(int, 1),
        default=6,
        metavar="N",
        help="prompts in the report (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    return parser.parse_args(argv)


# --- what is drawn -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row that is to be filled. flags: of txt2img.py, what to draw is not among them. folder: of its pictures."""

    row: Row
    flags: tuple[str, ...]
    options: SamplingOptions
    folder: Path

    @property
    def engine(self) -> str:
        """What computes it."""
        return "float" if self.options.quantization is None else self.options.quantization.engine


def prompts_of(protocol: Protocol, n: int) -> list[str]:
    """n prompts; those of a template go through all classes of ImageNet evenly."""
    if protocol.prompts == "shapes":
        data = ShapesDataset(n, "heldout", 128, SHAPES_SEED)
        return [caption(data.spec(i)) for i in range(n)]
    classes = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [protocol.prompts.replace("{class}", classes[i * len(classes) // n]) for i in range(n)]


def model_flags(protocol: Protocol, args: argparse.Namespace) -> list[str]:
    """The flags that all commands take the model by."""
    flags = ["--config", str(ROOT / protocol.config), "--device", args.device]
    for name in ("ckpt", "tokenizer"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", getattr(args, name)]
    return flags


def tasks_of(
    rows: Sequence[Row], protocol: Protocol, prompts: Sequence[str], cali: Path, args: argparse.Namespace
) -> list[Task]:
    """The rows, in order. A folder has a name that changes with all that shapes its pictures.

    Raises ValueError if the cali_ckpt, of which the header is read, is not what a row needs.
    """
    tasks = []
    for row in rows:
        flags = [*model_flags(protocol, args), *protocol.drawing, *row.flags]
        flags += [] if row.weight_bit is None else ["--cali_ckpt", str(cali)]
        given, choice, options = options_of(flags)
        facts = {
            "options": asdict(options),
            "hashes": choice.hashes,
            "tokenizer": args.tokenizer,
            "device": choose_device(given.device).type,
            "batch": args.n_samples,
            "seed": protocol.seed,
            "prompts": prompts,
            "versions": versions(),
        }
        if options.quantization is not None:
            for name in ("cali_ckpt", "low_memory"):  # its hash is there as well; and it changes no picture
                del facts["options"]["quantization"][name]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        folder = args.outdir / "pictures" / f"{row.key}-{key}"
        tasks.append(Task(row=row, flags=tuple(flags), options=options, folder=folder))
    return tasks


def cali_ckpt_of(protocol: Protocol, args: argparse.Namespace) -> Path:
    """Of W4A8: the one given, the one that comes with the model, or one that is made now."""
    if args.cali_ckpt is not None:
        return args.cali_ckpt
    choice = options_of(model_flags(protocol, args))[1]
    shipped = choice.cali_ckpts.get(4)
    if shipped is not None and shipped.is_file():
        return shipped
    flags = [*model_flags(protocol, args), *CALIBRATION, *protocol.calibration]
    key = hashlib.sha256(json.dumps([*protocol.calibration, *choice.hashes.values()]).encode()).hexdigest()[:12]
    return calibrate.ready_made(args.outdir / f"calibration-{key}", flags)


def draw(task: Task, prompts: Sequence[str], seed: int, batch_size: int) -> None:
    """Draw what is missing of a row's pictures."""

    def build() -> tuple[nn.Module, SamplingOptions]:
        model, _, options = model_of(task.flags)
        return model, options

    paths = [task.folder / f"{i:05}.png" for i in range(len(prompts))]
    seeds = [seed + i for i in range(len(prompts))]
    draw_missing(build, prompts, seeds, paths, batch_size, task.row.title)


# --- what is measured --------------------------------------------------------------------------------------


def scoring(folder: Path, protocol: Protocol, args: argparse.Namespace, *more: str) -> argparse.Namespace:
    """The arguments of eval_fid.py for the pictures in `folder`."""
    flags = [str(folder), "--reference", args.reference or protocol.reference, *protocol.scoring]
    flags += ["--cache", str(args.cache), "--device", args.device]
    flags += ["--inception_weights", args.inception_weights] if args.inception_weights else []
    return eval_fid.parse_args([*flags, *more])


def measured(task: Task, base: Task, protocol: Protocol, args: argparse.Namespace) -> tuple[dict[str, Any], Scores]:
    """A row of results.json, but for its change against the baseline; and its scores."""
    logger.info("scoring %s", task.row.title)
    paired = ["--paired", str(base.folder)] if task is not base else []
    facts, scores, label = eval_fid.run(scoring(task.folder, protocol, args, *paired))
    row = {
        **asdict(task.row),
        "title": task.row.title,
        "n": facts["pictures"]["n"],
        "features": label.strip(" ()"),
        "scores": {key: {**asdict(score), "replicates": ()} for key, score in scores.by_key.items()},
        "notes": scores.notes,
        "protocol": facts,
        "engine": task.engine,
        "precision": task.options.precision,
        "unet": unet_figures(task.flags, base.flags, task.folder / "unet.json", args.repeats),
        "pictures": str(task.folder.relative_to(args.outdir)),
    }
    return row, scores


def change(row: Scores, base: Scores) -> dict[str, float | None]:
    """By how many % the FID is above the baseline's, with a 95% interval: both are without the same tenths of pairs."""
    own, other = row.by_key["fid"], base.by_key["fid"]
    value = 100 * (own.value / other.value - 1)
    replicates = [100 * (a / b - 1) for a, b in zip(own.replicates, other.replicates, strict=True)]
    if not replicates:
        return {"value": value, "low": None, "high": None}
    half = jackknife_error(replicates) * T_QUANTILE
    return {"value": value, "low": value - half, "high": value + half}


def rows_of(
    tasks: Sequence[Task], prompts: Sequence[str], protocol: Protocol, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Draw and measure all rows, the first of which is the baseline. Only the first process measures, and yields."""
    base_scores = None
    for task in tasks:
        draw(task, prompts, protocol.seed, args.n_samples)
        barrier()
        if rank() == 0:
            row, scores = measured(task, tasks[0], protocol, args)
            base_scores = base_scores or scores
            yield {**row, "change": change(scores, base_scores) if task is not tasks[0] else None}
        barrier()


# --- the run -----------------------------------------------------------------------------------------------


def check(protocol: Protocol, args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for what would otherwise be missing hours later."""
    if args.reference is None and protocol.reference is None:
        raise ValueError(f"--model {args.model} is scored against real pictures: give --reference imagenet:DIR")
    if args.cali_ckpt is not None and not args.cali_ckpt.is_file():
        raise FileNotFoundError(2, "No such file", str(args.cali_ckpt))
    for folder in (args.outdir, args.cache):
        check_writable(folder)
    options = options_of([*model_flags(protocol, args), *protocol.drawing])[2]
    check_scoring(scoring(args.outdir, protocol, args), (options.width, options.height))


def check_scoring(scored: argparse.Namespace, size: tuple[int, int]) -> None:
    """The same for the reference and the features. size: of the pictures to come, width and height."""
    suggested = SHAPES if scored.reference == SHAPES else "inception"
    if is_statistics(scored.reference):
        suggested = read_statistics(Path(scored.reference)).facts.get("extractor", suggested)
    else:
        per_class = scored.per_class or 5
        reference = open_source(
            scored.reference, what="reference", limit=scored.reference_n, per_class=per_class, shapes_side=size[0]
        )
        reference = reference.framed(choose_framing(scored.resize, scored.size, reference))
        if scored.resize == "none" and reference.size != size:
            raise ValueError(f"the reference is {size_text(reference.size)}, the pictures will be {size_text(size)}")
    name = scored.features or suggested
    if scored.inception_weights is not None and name != "inception":
        raise ValueError(f"--inception_weights has no effect with features of {name}: leave it out")
    choose_extractor(name, reader=scored.reader, inception_weights=scored.inception_weights)


def run(args: argparse.Namespace) -> None:
    rows, protocols = read_table(args.table)
    if args.model not in protocols:
        raise ValueError(f"table {str(args.table)!r} has no model {args.model}: it has {', '.join(protocols)}")
    protocol = protocols[args.model]
    check(protocol, args)
    prompts = prompts_of(protocol, args.pictures or protocol.pictures)
    cali = cali_ckpt_of(protocol, args)
    tasks = tasks_of(rows, protocol, prompts, cali, args)
    if quantized := [task for task in tasks if task.options.quantization is not None]:
        model_of(quantized[0].flags)  # a file that is damaged, or of another model, is told now
    shown = min(args.shown, len(prompts))
    results = {
        "model": args.model,
        "machine": machine(choose_device(args.device)),
        "drawing": protocol.drawing,
        "calibration": read_cali_header(cali).calibration,
        "n_samples": args.n_samples,
        "seed": protocol.seed,
        "repeats": args.repeats,
        "versions": versions(),
        "shown": [i * len(prompts) // shown for i in range(shown)],
        "prompts": prompts,
        "rows": [],
    }
    for row in rows_of(tasks, prompts, protocol, args):
        results["rows"].append(row)
        logger.info("%s", " | ".join(report.cells(row)))
    if rank() == 0:
        write(results, args.outdir)
        print(report.markdown(results))
        logger.info("written to %s", args.outdir / "results.html")


def write(results: dict[str, Any], outdir: Path) -> None:
    texts = {
        "results.json": json.dumps(results, indent=2, allow_nan=False),
        "results.md": report.markdown(results),
        "results.html": report.page(results, outdir),
    }
    for name, text in texts.items():
        write_atomically(outdir / name, lambda path, text=text: path.write_text(text + "\n", encoding="utf-8"))


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose), processes():
        args.device = str(own_device(args.device))
        run(args)


if __name__ == "__main__":
    main()
