"""Measure whole pictures, each in a process of its own, from the start of the process to the PNG on the disk."""

import json
import logging
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from dsdiff.benchmark import peers, variants
from dsdiff.benchmark.options import (
    DIFFUSERS,
    MERGED_RATIO,
    MERGING,
    PEERS,
    PICTURE_ENGINES,
    QUANTIZED_ENGINES,
    SDCPP,
    TINY,
    BenchmarkOptions,
    Draw,
)
from dsdiff.benchmark.pictures.figures import Drawn, PictureReport, Row, RowMeasured, drawn_of, figures_of
from dsdiff.benchmark.pictures.files import Files, ModelFiles
from dsdiff.benchmark.pictures.request import PictureRequest, PictureTold
from dsdiff.benchmark.process import WorkerError, python_command, python_environment
from dsdiff.benchmark.source import Source
from dsdiff.draw_settings import SAMPLERS
from dsdiff.environment import choose_device, machine
from dsdiff.models.configs import read_config
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.options import FEW_STEP

logger = logging.getLogger(__name__)

TIMESTEPS = 1000  # of the noise process, unless the config says otherwise
SLOW_STEPS = 2  # the most that are measured of a peer whose steps take a minute


def benchmark(options: BenchmarkOptions) -> PictureReport:
    """Measure all that the options ask for; write the pictures of the last repeat to OUTDIR/pictures.

    Rows take turns as in `timing.measure`. Raises ValueError or OSError for what cannot be measured. A peer that fails
    is left out, and the report says why.
    """
    device = choose_device(options.device)
    source = Source.read(options.config_path, options.random_weights, device)
    files = Files(options, source)
    config = variants.quant_config(options.weight_bit)
    names, left_out = variants.choose_engines(options.engines, config, device, PICTURE_ENGINES)
    chosen, missing = peers.choose_peers(options.peers, device, pictures=True)
    left_out |= missing | {name: reason for name in (*names, *chosen) if (reason := files.why_not(name))}
    sampling = read_config(source.config).get("sampling", {})
    rows = rows_of([name for name in (*names, *chosen) if name not in left_out], options, source)
    scale = float(sampling.get("scale", 7.5))
    ready = _make_files(rows, files, scale, left_out)
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)
    rows = [row for row in rows if row in ready]
    _warm_up(rows, ready, options)
    found = _measure(rows, ready, options, scale, left_out)
    return PictureReport(
        model=_model(source, options),
        size=(sampling.get("width", 0), sampling.get("height", 0)),
        machine=machine(device),
        repeats=options.repeats,
        rows=figures_of(found),
        left_out=left_out,
    )


def rows_of(names: Sequence[str], options: BenchmarkOptions, source: Source) -> list[Row]:
    """Return all rows: for each way to draw, the engines with all ratios, then the peers, of which few merge."""
    timesteps = source.params.get("timesteps") or TIMESTEPS
    rows = []
    for draw in options.draws:
        steps = _steps_taken(draw, timesteps)
        for name in names:
            if draw.tiny and name in (*DIFFUSERS, *SDCPP):
                continue
            most = min(options.steps_measured, SLOW_STEPS if name in SDCPP else options.steps_measured)
            measured = steps if options.full else min(steps, most)
            ratios = options.chosen_ratios if name not in PEERS else (MERGED_RATIO if name in MERGING else 0.0,)
            rows += [Row(name=name, ratio=ratio, draw=draw, steps=steps, measured=measured) for ratio in ratios]
    return list(dict.fromkeys(rows))


def _steps_taken(draw: Draw, timesteps: int) -> int:
    return SAMPLERS[draw.sampler].steps_taken(draw.steps, timesteps)


def _model(source: Source, options: BenchmarkOptions) -> str:
    weights = "random weights" if source.ckpt is None else "trained weights"
    return f"{source.config.name}, {weights}, quantized to W{options.weight_bit}A8"


# --- before measuring --------------------------------------------------------------------------------------


def _make_files(rows: Sequence[Row], files: Files, scale: float, left_out: dict[str, str]) -> dict[Row, ModelFiles]:
    """Return the files of each row; a peer without them is left out."""
    ready = {}
    for row in tqdm(rows, "making files", unit="row"):
        if row.name in left_out:
            continue
        try:
            ready[row] = files.of(row.name, _scale(row.draw, scale), tiny=row.draw.tiny)
        except WorkerError as error:
            if row.name not in PEERS:
                raise
            left_out[row.name] = str(error)
    return {row: made for row, made in ready.items() if row.name not in left_out}


def _warm_up(rows: Sequence[Row], ready: Mapping[Row, ModelFiles], options: BenchmarkOptions) -> None:
    """Bring all files into the system's cache; compile our kernels, by a picture of the embedded model."""
    for path in {path for row in rows for path in ready[row].stored}:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    if any(row.name in QUANTIZED_ENGINES for row in rows):
        (ckpt,) = CHECKPOINTS[EMBEDDED]
        calibrated = CALI_CKPTS[ckpt][4]
        row = Row(name="int8", ratio=0.5, draw=Draw(sampler="dpm_solver", steps=2), steps=2, measured=2)
        made = ModelFiles(ckpt=ckpt, tokenizer=None, others={"cali_ckpt": calibrated}, stored=[ckpt])
        draw_alone(request_of(row, made, options, EMBEDDED, 4.0))


# --- measuring ---------------------------------------------------------------------------------------------


def _measure(
    rows: Sequence[Row],
    ready: Mapping[Row, ModelFiles],
    options: BenchmarkOptions,
    scale: float,
    left_out: dict[str, str],
) -> dict[Row, RowMeasured]:
    """Draw the pictures of all rows in turn, every second repeat backwards. A peer that fails is not drawn again."""
    found = {row: RowMeasured(file_bytes=ready[row].bytes) for row in rows}
    rounds = [row for i in range(options.repeats) for row in (rows if i % 2 == 0 else rows[::-1])]
    for row in tqdm(rounds, unit="picture"):
        if row.name in left_out:
            continue
        try:
            request = request_of(row, ready[row], options, options.config_path, scale)
            found[row].drawn.append(draw_alone(request, row.steps))
        except (WorkerError, ValueError) as error:
            if row.name not in PEERS:
                raise
            left_out[row.name] = str(error)
            logger.warning("%s is left out: %s", row.name, error)
    return {row: measured for row, measured in found.items() if row.name not in left_out}


def request_of(row: Row, files: ModelFiles, options: BenchmarkOptions, config: Path, scale: float) -> PictureRequest:
    """Return what a process is asked to draw. scale: of guidance, where the row has none."""
    folder = (options.outdir / "pictures").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    draw = row.draw
    guided = "" if draw.scale is None else f"-scale{draw.scale:g}"
    decoder = f"-{TINY}" if draw.tiny else ""
    return PictureRequest(
        name=row.name,
        ratio=row.ratio,
        sampler=draw.sampler,
        steps=row.measured,
        scale=_scale(draw, scale),
        tiny=draw.tiny,
        config=str(config),
        ckpt=str(files.ckpt.resolve()),
        tokenizer=None if files.tokenizer is None else str(files.tokenizer),
        files={part: str(path.resolve()) for part, path in files.others.items()},
        png=str(folder / f"{row.name}-ratio{row.ratio:g}-{draw.sampler}{draw.steps}{guided}{decoder}.png"),
        device=str(choose_device(options.device)),
        threads=options.threads,
    )


def _scale(draw: Draw, scale: float) -> float:
    """Return the scale of guidance: the row's, else none with samplers of few steps, else `scale`, the model's."""
    return draw.scale if draw.scale is not None else 1.0 if draw.sampler in FEW_STEP else scale


def draw_alone(request: PictureRequest, steps: int = 0) -> Drawn:
    """Draw a picture in a process of its own. steps: those of the whole picture. Raises WorkerError if it fails."""
    begin = time.time()
    command = [*python_command("dsdiff.benchmark.pictures.child"), request.to_json()]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=python_environment())
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise WorkerError(lines[-1] if lines else f"its process ended ({result.returncode})")
    return drawn_of(PictureTold(**json.loads(result.stdout.splitlines()[-1])), begin, steps)
