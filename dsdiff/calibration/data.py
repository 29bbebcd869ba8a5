"""The data of a calibration: the UNet's inputs while pictures of prompts are drawn, kept on disk."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dsdiff.calibration.options import CalibrationOptions
from dsdiff.draw_settings import DrawSettings
from dsdiff.jobs import read_prompt_file
from dsdiff.models.quantized import check_quantizable
from dsdiff.models.spec import ModelSpec
from dsdiff.pipeline import Pipeline
from ldm.fileio import file_sha256, write_atomically
from ldm.messages import first_line
from ldm.models.diffusion.guidance import guided_steps
from ldm.tensor_files import check_whole, save_tensors
from qdiff.calibration_set import CalibrationSet, chosen_calls, recorded_inputs
from qdiff.distributed import barrier, rank
from qdiff.finite import named

logger = logging.getLogger(__name__)

# Fields of DrawSettings that the data does not depend on, and values of others that leave them out of its facts, since
# older files do not know of them.
WITHOUT_EFFECT = ("merge", "quantization", "vae", "vae_tiling", "tiny_decoder")
NEUTRAL = {
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "cache": 1,
    "cache_depth": 1,
    "lora": (),
    "prompt_weights": False,
    "long_prompts": "cut",
    "embeddings": (),
    "init": None,
}

MAX_BATCH = 16  # pictures drawn at a time


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The data of a calibration, before it is drawn.

    samples: how many inputs of the UNet there will be. x, context: their shapes [C, h, w] and [M, D]; None without a
    context. ready: the data, if it is there. drawn: how many samples the UNet computes to draw what is not, `together`
    of them in a call at most, in `precision`.
    """

    samples: int
    x: tuple[int, ...]
    context: tuple[int, ...] | None
    ready: CalibrationSet | None = None
    drawn: int = 0
    together: int = 0
    precision: str = "full"

    @classmethod
    def of(cls, data: CalibrationSet) -> "DataPlan":
        """Return the plan of data that is there."""
        context = None if data.context is None else tuple(data.context.shape[1:])
        return cls(samples=len(data), x=tuple(data.x.shape[1:]), context=context, ready=data)

    @property
    def bytes_written(self) -> int:
        """Bytes of the file to be written; 0 for data that is there."""
        return 0 if self.ready is not None else self.bytes_held

    @property
    def bytes_held(self) -> int:
        """Bytes of the data in memory."""
        return 4 * self.samples * (math.prod(self.x) + 1 + math.prod(self.context or (0,)))


def plan_data(pipeline: Pipeline, options: CalibrationOptions) -> DataPlan:
    """Return what data the options ask for; it is read if it is there, and not drawn if it is not.

    Raises ValueError for data of another model, and for options that cannot be.
    """
    if options.data_path is not None:
        data = CalibrationSet.load(options.data_path, options.effort.cali_st, options.effort.cali_n)
        return DataPlan.of(_fitting(data, pipeline, options))
    drawing = _plan_drawing(pipeline, options)
    ready = drawing.read()
    if ready is not None:
        return DataPlan.of(_fitting(ready, pipeline, options))
    settings, spec = drawing.settings, pipeline.spec
    guided = guided_steps(settings.steps_taken, (settings.guidance_start, settings.guidance_stop))
    rows = [1 + (each and settings.guides) for each in guided]
    calls = chosen_calls(settings.steps_taken, options.effort.cali_st)
    samples = options.effort.cali_n * sum(rows[call] if options.cond else 1 for call in calls)
    width = pipeline.model.model.diffusion_model.context_dim
    return DataPlan(
        samples=min(samples, options.num_samples or samples),
        x=(spec.channels, settings.height // spec.factor, settings.width // spec.factor),
        context=None if width is None else (spec.prompt_room + 2, width),
        drawn=(options.effort.cali_n - drawing.pictures_kept()) * sum(rows),
        together=min(options.effort.cali_n, MAX_BATCH) * max(rows),
        precision=settings.precision,
    )


def calibration_data(pipeline: Pipeline, options: CalibrationOptions) -> CalibrationSet:
    """Return the data that the options ask for: from a file, from an earlier calibration, or drawn now and kept.

    pipeline: the float model. Under torchrun all processes call this, and the first one draws.
    Raises ValueError for data of another model, and for options that cannot be.
    """
    if options.data_path is not None:
        data = CalibrationSet.load(options.data_path, options.effort.cali_st, options.effort.cali_n)
    else:
        data = _collected(pipeline, options)
    return _fitting(data, pipeline, options)


def _fitting(data: CalibrationSet, pipeline: Pipeline, options: CalibrationOptions) -> CalibrationSet:
    """Return the part of the data that the options ask for. Raises ValueError for data of another model."""
    unet = pipeline.model.model.diffusion_model
    width = None if data.context is None else data.context.shape[2]
    if (data.x.shape[1], width) != (unet.in_channels, unet.context_dim):
        raise ValueError(
            f"the calibration data has {data.x.shape[1]} channels and a context of {width}, the model "
            f"{unet.in_channels} and {unet.context_dim}: it is of another model"
        )
    return data.subset(options.num_samples or len(data), options.seed)


# --- drawing it --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """How data is drawn. facts: all that it depends on. file: where it is kept."""

    settings: DrawSettings
    prompts: Sequence[str]
    facts: Mapping[str, Any]
    file: Path

    @property
    def parts(self) -> Path:
        """The folder of the batches that are drawn, until the file is written."""
        return self.file.with_suffix(".parts")

    def read(self) -> CalibrationSet | None:
        """Return the data; None if it is not there, or damaged, which is told."""
        if not self.file.exists():
            return None
        try:
            return CalibrationSet.load(self.file)
        except ValueError as error:
            logger.warning("%s; it is drawn anew", error)
            return None

    def pictures_kept(self) -> int:
        """Return how many pictures were drawn by an interrupted run."""
        return min(MAX_BATCH * len(list(self.parts.glob("*.safetensors"))), self.facts["cali_n"])


def _plan_drawing(pipeline: Pipeline, options: CalibrationOptions) -> _Drawing:
    check_quantizable(pipeline.spec)
    # Captions are plain text, and contexts of one length can be kept together.
    settings = pipeline.resolve(replace(options.draw, prompt_weights=False, long_prompts="cut"))
    if options.cond and not settings.guides:
        way = (
            "with --scale 1"
            if settings.scale == 1
            else "with no guided step between --guidance_start and --guidance_stop"
        )
        raise ValueError(f"--cond: {way} there is no branch without the prompt: leave one of them out")
    path = _prompt_file(pipeline.spec, options)
    prompts = read_prompt_file(path, "--prompts")
    facts = _facts(pipeline, settings, path, options)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return _Drawing(settings=settings, prompts=prompts, facts=facts, file=options.outdir / f"data-{key}.safetensors")


def _collected(pipeline: Pipeline, options: CalibrationOptions) -> CalibrationSet:
    """Return data drawn with the float model; an earlier calibration's if it was drawn with the same settings."""
    drawing = _plan_drawing(pipeline, options)
    data = drawing.read() if rank() == 0 else None
    if data is None and rank() == 0:
        data = collect(pipeline, drawing.prompts, drawing.settings, options, drawing.facts, drawing.parts)
        options.outdir.mkdir(parents=True, exist_ok=True)
        data.save(drawing.file)
        _remove_parts(drawing.parts)
    barrier()
    logger.info("calibration data: %s", drawing.file)
    return CalibrationSet.load(drawing.file)


def _prompt_file(spec: ModelSpec, options: CalibrationOptions) -> Path:
    path = options.prompts or spec.cali_prompts
    if path is None:
        raise ValueError(f"no prompts are known for {spec.description}: give --prompts FILE or --data_path FILE")
    return path


def _facts(pipeline: Pipeline, settings: DrawSettings, prompts: Path, options: CalibrationOptions) -> dict[str, Any]:
    """Return all that the data depends on, as plain values. Kept files are named by its hash: do not change it."""
    sampling = asdict(settings)
    for name in WITHOUT_EFFECT:
        del sampling[name]
    for name, neutral in NEUTRAL.items():
        if sampling.get(name) == neutral:
            del sampling[name]
    return {
        **pipeline.spec.hashes,
        "prompts": prompts.name,
        "prompts_sha256": file_sha256(prompts),
        "sampling": sampling,
        "seed": options.seed,
        "cali_st": options.effort.cali_st,
        "cali_n": options.effort.cali_n,
        "cond": options.cond,
        "device": pipeline.device.type,
    }


def collect(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: DrawSettings,
    options: CalibrationOptions,
    facts: Mapping[str, Any],
    parts: Path,
) -> CalibrationSet:
    """Draw cali_n pictures, and return the UNet's inputs at cali_st of their timesteps.

    Prompts are taken in turn, and picture i starts from the noise of seed + i. Samples are in the order of timesteps;
    at each of them come the pictures in batches, [without prompt; with prompt] where both branches are kept.
    facts: kept with the data. parts: a folder in which each batch is kept, and from which those of an interrupted run
    are taken. Raises ValueError, which names the pictures and the step, for what becomes NaN or infinite.
    """
    pictures = options.effort.cali_n
    unet = pipeline.prepare(settings).model.diffusion_model
    calls = chosen_calls(settings.steps_taken, options.effort.cali_st)
    size = min(pictures, MAX_BATCH)
    batches: list[list[tuple[Tensor, ...]]] = []
    with tqdm(total=pictures, desc="calibration data", unit="picture", disable=rank() != 0) as bar:
        for start in range(0, pictures, size):
            numbers = range(start, min(start + size, pictures))
            file = parts / f"{start:06}.safetensors"
            batch = _read_part(file, len(calls))
            if batch is None:
                texts = [prompts[i % len(prompts)] for i in numbers]
                with _told(numbers, pictures), recorded_inputs(unet, calls) as kept:
                    pipeline.sample(texts, [options.seed + i for i in numbers], settings)
                batch = [values if options.cond else _with_prompt(values, len(texts)) for values in kept]
                _write_part(file, batch)
            batches.append(batch)
            bar.update(len(numbers))
    steps = zip(*batches, strict=True)
    x, t, *context = (
        torch.cat(tensors) for tensors in zip(*(values for step in steps for values in step), strict=True)
    )
    return CalibrationSet(x, t, context[0] if context else None, dict(facts))


@contextmanager
def _told(numbers: range, pictures: int) -> Iterator[None]:
    """Name the pictures in errors within the block, and tell how to go on after an interruption."""
    try:
        with named(f"calibration data, pictures {numbers[0]} to {numbers[-1]}"):
            yield
    except KeyboardInterrupt:
        done = f"{numbers[0]} of {pictures} pictures of the calibration data are drawn"
        raise KeyboardInterrupt(f"{done}; the same command goes on") from None


def _with_prompt(values: tuple[Tensor, ...], pictures: int) -> tuple[Tensor, ...]:
    """Return the part with prompt of a call's inputs: the second half of a guided call, all of another one."""
    return tuple(value[-pictures:] for value in values)


def _write_part(file: Path, batch: Sequence[tuple[Tensor, ...]]) -> None:
    """Keep a batch: for each call its tensors, under the numbers of both."""
    tensors = {f"{call:04}.{i}": value for call, values in enumerate(batch) for i, value in enumerate(values)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: save_tensors(tensors, path))


def _read_part(file: Path, calls: int) -> list[tuple[Tensor, ...]] | None:
    """Return a batch that was kept; None if it was not, or if it is damaged, which is told."""
    if not file.exists():
        return None
    try:
        check_whole(file)
        tensors = load_file(file)
        names = [sorted(name for name in tensors if name.startswith(f"{call:04}.")) for call in range(calls)]
        if not all(names):
            raise ValueError("calls are missing")
        return [tuple(tensors[name] for name in own) for own in names]
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged and drawn anew (%s)", file, first_line(error))
        return None


def _remove_parts(folder: Path) -> None:
    for pattern in ("*.safetensors", ".*.tmp"):  # the latter were being written as their process was killed
        for file in folder.glob(pattern):
            file.unlink()
    with suppress(OSError):  # there is none, or something else in it
        folder.rmdir()
