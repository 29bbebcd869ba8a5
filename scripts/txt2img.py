#!/usr/bin/env python
"""Text in, picture out: python scripts/txt2img.py --prompt "a red circle on a blue background"

Draws with Stable Diffusion v1 if its checkpoint lies at models/ldm/stable-diffusion-v1/model.ckpt or
model.safetensors, else with the embedded model, which knows simple shapes. Writes OUTDIR/samples/00000.png and so on,
a grid, settings.yaml and log.txt. Each PNG holds its prompt, its seed and all settings. An OUTDIR with pictures gets
more; none is replaced.

Picture i starts from the noise of seed + i, whatever the batch size: other sizes give the same pictures up to
rounding. With --from-file, a batch takes --n_samples prompts, and the file is gone through --n_iter times.
"""

# ruff: noqa: E402
import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.cli.console import ArgumentParser, Log, command, logger, logs, number
from dsdiff.cli.flags import (
    add_model_arguments,
    add_noise_arguments,
    add_quantization_arguments,
    add_sampler_arguments,
    add_size_arguments,
    add_tome_arguments,
)
from dsdiff.images.png import to_pictures, write_png
from dsdiff.jobs import read_prompt_file
from dsdiff.pipeline import (
    ModelChoice,
    SamplingOptions,
    build_model,
    choose_device,
    choose_model,
    decode,
    sample,
    sampling_options,
    versions,
)
from ldm.fileio import check_writable, write_atomically

# Settings that do not shape a picture: a resumed run may have others.
INCIDENTAL = ("model", "config", "ckpt", "tokenizer", "skip_grid", "n_rows", "first", "first_grid", "versions")
# Names by which other tools know the samplers.
USUAL_NAMES = {"ddim": "DDIM", "plms": "PLMS", "dpm_solver": "DPM++ 2M"}
GRID_GAP = 2  # pixels
GRID_PICTURES = 64  # on one page, or one row if that is longer


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to draw; `path` is where it goes."""

    prompt: str
    seed: int
    path: Path


# --- the command line --------------------------------------------------------------------------------------


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
    add_model_arguments(parser)
    add_sampler_arguments(parser)
    add_noise_arguments(parser)
    add_size_arguments(parser)
    add_tome_arguments(parser)
    add_quantization_arguments(parser)
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.from_file is None):
        parser.error("give either --prompt TEXT or --from-file FILE")
    if args.skip_grid and args.n_rows is not None:
        parser.error("--n_rows has no effect with --skip_grid: leave one of them out")
    if args.skip_save and args.resume:
        parser.error("--resume goes by the pictures that --skip_save does not write: leave one of them out")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompt, or those of the file. ValueError if it holds none."""
    prompts = [args.prompt] if args.from_file is None else read_prompt_file(args.from_file, "--from-file")
    for text in (*prompts, args.negative_prompt or ""):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # stray bytes of the command line
            raise ValueError(f"prompt {text!r} is no valid text: use UTF-8") from error
    return prompts


# --- settings ----------------------------------------------------------------------------------------------


def collect_settings(
    args: argparse.Namespace, choice: ModelChoice, options: SamplingOptions, prompts: Sequence[str]
) -> dict[str, Any]:
    """All settings of a run, defaults resolved, as plain values for yaml and json."""
    return {
        "prompts": list(prompts),
        "pictures": args.n_iter * (args.n_samples if args.from_file is None else len(prompts)),
        "n_iter": args.n_iter,
        "n_samples": args.n_samples,
        "seed": args.seed,
        "fixed_code": args.fixed_code,
        **asdict(options),  # the values of `merge` and `quantization` are plain as well
        "device": choose_device(args.device).type,
        "model": choice.description,
        "config": str(choice.config_path),
        "ckpt": str(choice.ckpt),
        "tokenizer": args.tokenizer,
        **choice.hashes,
        "skip_grid": args.skip_grid,
        "n_rows": args.n_rows or args.n_samples,
        "first": next_number(args.outdir / "samples", ""),
        "first_grid": next_number(args.outdir, "grid-"),
        "versions": versions(),
    }


def next_number(folder: Path, prefix: str) -> int:
    """One more than the highest number of the PNGs `prefix`NUMBER.png in `folder`, or 0."""
    names = [path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.png")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=-1) + 1


def take_up(outdir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the picture numbers of the run in `outdir`, if one is there.

    Raises ValueError if that run has other settings, so that its pictures would not fit those to come.
    """
    path = outdir / "settings.yaml"
    if not path.exists():
        if settings["first"] or settings["first_grid"]:
            raise ValueError(f"--resume: {str(outdir)!r} holds pictures but no settings.yaml: choose another --outdir")
        return dict(settings)
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        numbers = {name: int(old[name]) for name in ("first", "first_grid")}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"--resume: {str(path)!r} cannot be read: choose another --outdir") from error
    before, now = _flat(old), _flat(settings)
    names = [name for name in (*now, *before) if name.split(".")[0] not in INCIDENTAL]
    changed = [name for name in dict.fromkeys(names) if before.get(name) != now.get(name)]
    if changed:
        what = ", ".join(_difference(name, before.get(name), now.get(name)) for name in changed[:3])
        raise ValueError(f"--resume: the run in {str(outdir)!r} has other settings: {what}; use its flags")
    if old.get("versions") != settings["versions"]:
        logger.warning("the run was begun with %s: pictures may differ", old.get("versions"))
    return {**settings, **numbers}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of groups such as `merge` by their whole names, `merge.ratio`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _difference(name: str, old: Any, new: Any) -> str:
    short = len(f"{old}{new}") < 100
    return f"{name} ({old} there, {new} here)" if short else name


def picture_texts(settings: Mapping[str, Any], job: Job) -> dict[str, str]:
    """The text chunks of a PNG: prompt, seed, all settings as JSON, and the main ones as other tools write them.

    Files are told by their names and hashes: a picture that is passed on should not tell where they lie.
    """
    left_out = ("prompts", "first", "first_grid", "skip_grid", "n_rows")
    own = {"prompt": job.prompt, **{name: value for name, value in settings.items() if name not in left_out}}
    own |= {name: Path(own[name]).name for name in ("config", "ckpt", "tokenizer") if own[name]}
    if own["quantization"]:
        own["quantization"] = {**own["quantization"], "cali_ckpt": Path(own["quantization"]["cali_ckpt"]).name}
    own |= {"seed": job.seed, "run_seed": settings["seed"]}
    return {
        "prompt": job.prompt,
        "seed": str(job.seed),
        "dsdiff": json.dumps(own, ensure_ascii=False),
        "parameters": _parameters(settings, job),
    }


def _parameters(settings: Mapping[str, Any], job: Job) -> str:
    """The chunk that stable-diffusion-webui writes and many viewers show."""
    lines = [job.prompt]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = {
        "Steps": settings["steps"],
        "Sampler": USUAL_NAMES[settings["sampler"]],
        "CFG scale": f"{settings['scale']:g}",
        "Seed": job.seed,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings["ckpt_sha256"][:10],
        "Model": Path(settings["ckpt"]).stem,
    }
    if settings["eta"]:
        facts["Eta"] = f"{settings['eta']:g}"
    if settings["quantization"]:
        facts["Quantization"] = settings["quantization"]["bits"]
    if settings["merge"]:
        facts["Token merging ratio"] = f"{settings['merge']['ratio']:g}"
    lines.append(", ".join(f"{name}: {_quoted(str(fact))}" for name, fact in facts.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


# --- pictures ----------------------------------------------------------------------------------------------


def plan(settings: Mapping[str, Any], outdir: Path) -> list[list[Job]]:
    """The run's pictures, in batches. A resumed run has the same batches, so that rounding is the same too."""
    prompts = settings["prompts"]
    first, seed, step = settings["first"], settings["seed"], 0 if settings["fixed_code"] else 1
    jobs = [
        Job(prompt=prompts[i % len(prompts)], seed=seed + i * step, path=outdir / "samples" / f"{first + i:05}.png")
        for i in range(settings["pictures"])
    ]
    size = settings["n_samples"]
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def load_picture(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """The picture at `path`; None if it is missing, damaged or not of `size` (width, height)."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # whatever a damaged file leads to: it is drawn again
        return None
    return picture if picture.size == size else None


class Grids:
    """Collects pictures in their order into pages `grid-0000.png`, and so on."""

    def __init__(self, outdir: Path, first: int, columns: int):
        self.outdir, self.number, self.columns = outdir, first, columns
        self.limit = max(GRID_PICTURES // columns, 1) * columns
        self.pictures: list[Image.Image] = []

    def add(self, pictures: Sequence[Image.Image]) -> None:
        for picture in pictures:
            self.pictures.append(picture)
            if len(self.pictures) == self.limit:
                self.flush()

    def flush(self) -> None:
        """Write the page that is not full yet, if it holds anything."""
        if self.pictures:
            write_png(self.outdir / f"grid-{self.number:04}.png", tile(self.pictures, self.columns))
            self.number, self.pictures = self.number + 1, []


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """The pictures, all of one size, in rows from the top left, on black."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (side + GRID_GAP for side in pictures[0].size)
    page = Image.new("RGB", (columns * width + GRID_GAP, rows * height + GRID_GAP))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width + GRID_GAP, i // columns * height + GRID_GAP))
    return page


# --- the run -----------------------------------------------------------------------------------------------


class Run:
    """Draws batches and keeps the time. Counts what was drawn, not what an earlier run had left."""

    def __init__(self, args: argparse.Namespace, settings: Mapping[str, Any], options: SamplingOptions):
        self.args, self.settings, self.options = args, settings, options
        self.size = (options.width, options.height)
        self.pictures = self.steps = 0
        self.seconds = self.sampling_seconds = 0.0

    def is_done(self, batch: Sequence[Job]) -> bool:
        return self.args.resume and all(load_picture(job.path, self.size) is not None for job in batch)

    def draw(self, model: torch.nn.Module, batch: Sequence[Job]) -> list[Image.Image]:
        start = time.perf_counter()
        prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
        latents = sample(model, prompts, seeds, self.options, verbose=True, callback=self._count_step)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        self.sampling_seconds += time.perf_counter() - start
        pictures = to_pictures(decode(model, latents))
        self.seconds += time.perf_counter() - start
        self.pictures += len(pictures)
        return pictures

    def _count_step(self, i: int) -> None:
        self.steps += 1

    def save(self, batch: Sequence[Job], pictures: Sequence[Image.Image]) -> None:
        for job, picture in zip(batch, pictures, strict=True):
            kept = self.args.resume and load_picture(job.path, self.size) is not None
            if not kept and not self.args.skip_save:
                write_png(job.path, picture, picture_texts(self.settings, job))

    def summary(self) -> str:
        if not self.pictures:
            return "nothing left to draw: all pictures of this run are there"
        rate, pace = self.pictures / self.seconds, self.sampling_seconds / self.steps
        return f"{self.pictures} pictures in {self.seconds:.1f} s: {rate:.3g} pictures/s, {pace:.3g} s/step"


def batches_of_pictures(
    run: Run, model: torch.nn.Module | None, batches: Sequence[Sequence[Job]], pending: Sequence[bool]
) -> Iterator[list[Image.Image]]:
    """The pictures of each batch: drawn and saved where the batch is pending, else loaded."""
    with tqdm(batches, "batches", unit="batch") as bar:  # an interrupt ends the bar's line, too
        for batch, to_draw in zip(bar, pending, strict=True):
            if to_draw:
                pictures = run.draw(model, batch)
                run.save(batch, pictures)
                yield pictures
            elif run.args.skip_grid:
                yield []
            else:
                yield [load_picture(job.path, run.size) for job in batch]


def execute(run: Run, model: torch.nn.Module | None, batches: Sequence[Sequence[Job]], pending: Sequence[bool]) -> None:
    """Draw what is pending, and the grids. An interrupt tells how to go on."""
    args, settings = run.args, run.settings
    grids = Grids(args.outdir, settings["first_grid"], settings["n_rows"])
    try:
        for pictures in batches_of_pictures(run, model, batches, pending):
            if not args.skip_grid:
                grids.add(pictures)
        grids.flush()
    except KeyboardInterrupt:
        way_on = "" if args.skip_save else f" in {args.outdir}; the same command with --resume draws the rest"
        raise KeyboardInterrupt(f"{run.pictures} pictures drawn{way_on}") from None


def begin(args: argparse.Namespace, settings: Mapping[str, Any], log: Log) -> None:
    """Make the folders and write the settings."""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    (args.outdir if args.skip_save else args.outdir / "samples").mkdir(parents=True, exist_ok=True)
    log.open(args.outdir / "log.txt")
    write_atomically(args.outdir / "settings.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def peak_memory() -> int | None:
    """The most bytes of memory that this process held; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def generate(args: argparse.Namespace, choice: ModelChoice, log: Log) -> None:
    prompts = read_prompts(args)
    options = sampling_options(args, choice)
    check_writable(args.outdir)
    check_writable(args.outdir / "samples")
    settings = collect_settings(args, choice, options, prompts)
    if args.resume:
        settings = take_up(args.outdir, settings)
    run = Run(args, settings, options)
    batches = plan(settings, args.outdir)
    pending = [not run.is_done(batch) for batch in batches]
    model = build_model(args, choice, options) if any(pending) else None  # nothing is written before the model is there
    begin(args, settings, log)
    execute(run, model, batches, pending)
    logger.info("%s", run.summary())
    if (peak := peak_memory()) is not None and run.pictures:
        logger.info("at most %.2f GB of memory", peak / 1e9)
    logger.info("written to %s", args.outdir)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose) as log:
        choice = choose_model(args)
        logger.info("%s", choice)
        logger.debug("arguments: %s", argv)
        generate(args, choice, log)


if __name__ == "__main__":
    main()
