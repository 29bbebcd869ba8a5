#!/usr/bin/env python
"""The table of results, by one command: python scripts/reproduce.py

For each row of configs/eval/table.yaml (few bits, fewer tokens, both) the same prompts are drawn from the same noise,
scored against the reference (FID, KID, precision, recall) and against the full-precision pictures (PSNR, SSIM, the
difference of the FIDs with its interval), and the UNet is timed side by side with the full-precision one. Writes
OUTDIR/results.json, results.md and results.html, which needs nothing beside it.

--model sd-v1 does the same with Stable Diffusion v1.4 after the original's protocol: it needs the checkpoint,
--reference imagenet:DIR, and torch-fidelity's Inception weights. Without --cali_ckpt the one that comes with the model
is taken, or one is made first, in OUTDIR/calibration.

Pictures are kept in OUTDIR/pictures and drawn only if they are not there: an interrupted run goes on with the same
command. With torchrun the processes share the pictures: torchrun --nproc_per_node 2 scripts/reproduce.py
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import ResNet50_Weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from ldm.data.shapes import ShapesDataset, caption
from qdiff.files import write_atomically
from qdiff.ranks import barrier, rank
from scripts import calibrate, eval_fid, report
from scripts.benchmark import machine
from scripts.common import CALI_CKPTS, CHECKPOINTS, SamplingOptions, choose_device, versions
from scripts.console import ArgumentParser, command, logger, logs, number
from scripts.drawing import draw_missing, model_of
from scripts.features import choose_extractor, is_statistics, read_statistics
from scripts.files import check_writable, file_sha256
from scripts.pace import unet_figures
from scripts.pictures import SHAPES, open_source
from scripts.processes import own_device, processes
from scripts.table import TABLE, Protocol, Row, read_table

SHAPES_SEED = 30_000  # of the captions: those of the reference are others
CALIBRATION = ["--weight_bit", "4", "--quant_act", "--act_bit", "8", "--sm_abit", "16", "--split", "--cond"]
MODELS = ("embedded", "sd-v1")


# --- the command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add("--table", type=Path, default=TABLE, metavar="FILE", help=f"default: {TABLE.relative_to(ROOT)}")
    add("--n", type=number(int, 2), metavar="N", help="pictures a row (default: the table's)")
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
    folder: Path


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
    """The rows, in order. A folder has a name that changes with all that shapes its pictures."""
    places = [Path(args.ckpt)] if args.ckpt else CHECKPOINTS[ROOT / protocol.config]
    ckpt, cali_hash = (file_sha256(path) for path in (next(path for path in places if path.is_file()), cali))
    common = [
        ckpt,
        choose_device(args.device).type,
        str(args.n_samples),
        str(protocol.seed),
        *protocol.drawing,
        *prompts,
    ]
    tasks = []
    for row in rows:
        bits = [] if row.weight_bit is None else [*row.flags, cali_hash]
        facts = json.dumps([*common, str(row.ratio), *bits]).encode()
        folder = args.outdir / "pictures" / f"{row.key}-{hashlib.sha256(facts).hexdigest()[:12]}"
        flags = [*model_flags(protocol, args), *protocol.drawing, *row.flags]
        flags += [] if row.weight_bit is None else ["--cali_ckpt", str(cali)]
        tasks.append(Task(row=row, flags=tuple(flags), folder=folder))
    return tasks


def cali_ckpt_of(protocol: Protocol, args: argparse.Namespace) -> Path:
    """Of W4A8: the one given, the one that comes with the model, or one that is made now."""
    if args.cali_ckpt is not None:
        return args.cali_ckpt
    shipped = CALI_CKPTS.get(CHECKPOINTS[ROOT / protocol.config][0], {}).get(4)
    if args.ckpt is None and shipped is not None and shipped.is_file():
        return shipped
    folder = args.outdir / "calibration"
    path = folder / "cali.safetensors"
    if not path.exists():
        logger.info("calibrating")
        begun = ["--resume"] if (folder / "progress" / "settings.json").exists() else []
        flags = [*model_flags(protocol, args), "--outdir", str(folder), *protocol.drawing, *CALIBRATION, *begun]
        barrier()  # all have seen whether it was begun
        calibrate.run(calibrate.parse_args(flags))
        barrier()
    return path


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


def measured(task: Task, base: Task, protocol: Protocol, args: argparse.Namespace) -> dict[str, Any]:
    """A row of results.json."""
    logger.info("scoring %s", task.row.title)
    paired = ["--paired", str(base.folder)] if task is not base else []
    facts, scores, label = eval_fid.run(scoring(task.folder, protocol, args, *paired))
    return {
        **asdict(task.row),
        "title": task.row.title,
        "n": facts["pictures"]["n"],
        "features": label.strip(" ()"),
        "scores": {key: {**asdict(score), "replicates": None} for key, score in scores.by_key.items()},
        "notes": scores.notes,
        "protocol": facts,
        "unet": unet_figures(task.flags, base.flags, task.folder / "unet.json", args.repeats),
        "pictures": str(task.folder.relative_to(args.outdir)),
    }


def rows_of(
    tasks: Sequence[Task], prompts: Sequence[str], protocol: Protocol, args: argparse.Namespace
) -> Iterator[dict]:
    """Draw and measure all rows, the first of which is the baseline. Only the first process measures, and yields."""
    for task in tasks:
        draw(task, prompts, protocol.seed, args.n_samples)
        barrier()
        if rank() == 0:
            yield measured(task, tasks[0], protocol, args)
        barrier()


# --- the run -----------------------------------------------------------------------------------------------


def check(protocol: Protocol, args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for what would otherwise be missing hours later."""
    if args.reference is None and protocol.reference is None:
        raise ValueError(f"--model {args.model} is scored against real pictures: give --reference imagenet:DIR")
    places = [Path(args.ckpt)] if args.ckpt else CHECKPOINTS.get(ROOT / protocol.config, ())
    if not any(path.is_file() for path in places):
        raise FileNotFoundError(f"no checkpoint at {' or '.join(map(str, places))}: put one there, or give --ckpt FILE")
    if args.cali_ckpt is not None and not args.cali_ckpt.is_file():
        raise FileNotFoundError(2, "No such file", str(args.cali_ckpt))
    for folder in (args.outdir, args.cache):
        check_writable(folder)
    scored = scoring(args.outdir, protocol, args)
    if is_statistics(scored.reference):
        read_statistics(Path(scored.reference))
    else:
        open_source(scored.reference, what="reference", limit=scored.reference_n, per_class=scored.per_class or 5)
    features = scored.features or (SHAPES if scored.reference == SHAPES else "inception")
    choose_extractor(features, reader=scored.reader, inception_weights=scored.inception_weights)


def run(args: argparse.Namespace) -> None:
    rows, protocols = read_table(args.table)
    protocol = protocols[args.model]
    check(protocol, args)
    prompts = prompts_of(protocol, args.n or protocol.pictures)
    results: dict[str, Any] = {
        "model": args.model,
        "machine": machine(choose_device(args.device)),
        "drawing": list(protocol.drawing),
        "n_samples": args.n_samples,
        "seed": protocol.seed,
        "repeats": args.repeats,
        "versions": versions(),
        "shown": [i * len(prompts) // args.shown for i in range(min(args.shown, len(prompts)))],
        "prompts": prompts,
        "rows": [],
    }
    tasks = tasks_of(rows, protocol, prompts, cali_ckpt_of(protocol, args), args)
    for row in rows_of(tasks, prompts, protocol, args):
        results["rows"].append(row)
        write(results, args.outdir)  # after each row: a look at what there is so far
    if rank() == 0:
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
        if rank() != 0:
            logger.setLevel(logging.WARNING)
        args.device = str(own_device(args.device))
        run(args)


if __name__ == "__main__":
    main()
