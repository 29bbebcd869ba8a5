"""The data of a calibration: the UNet's inputs while pictures of prompts are drawn, kept on disk."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsdiff.calibration.options import CalibrationOptions
from dsdiff.draw_settings import DrawSettings
from dsdiff.jobs import read_prompt_file
from dsdiff.models.quantized import check_quantizable
from dsdiff.models.spec import ModelSpec
from dsdiff.pipeline import Pipeline
from ldm.fileio import file_sha256
from qdiff.calibration_set import CalibrationSet, chosen_calls, recorded_inputs
from qdiff.distributed import barrier, rank

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


def calibration_data(pipeline: Pipeline, options: CalibrationOptions) -> CalibrationSet:
    """Return the data that the options ask for: from a file, from an earlier calibration, or drawn now and kept.

    pipeline: the float model. Under torchrun all processes call this, and the first one draws.
    Raises ValueError for data of another model, and for options that cannot be.
    """
    if options.data_path is not None:
        data = CalibrationSet.load(options.data_path, options.effort.cali_st, options.effort.cali_n)
    else:
        data = _collected(pipeline, options)
    unet = pipeline.model.model.diffusion_model
    width = None if data.context is None else data.context.shape[2]
    if (data.x.shape[1], width) != (unet.in_channels, unet.context_dim):
        raise ValueError(
            f"the calibration data has {data.x.shape[1]} channels and a context of {width}, the model "
            f"{unet.in_channels} and {unet.context_dim}: it is of another model"
        )
    return data.subset(options.num_samples or len(data), options.seed)


def _collected(pipeline: Pipeline, options: CalibrationOptions) -> CalibrationSet:
    """Return data drawn with the float model; an earlier calibration's if it was drawn with the same settings."""
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
    file = options.outdir / f"data-{key}.safetensors"
    if not file.exists() and rank() == 0:
        data = collect(pipeline, prompts, settings, options, facts)
        options.outdir.mkdir(parents=True, exist_ok=True)
        data.save(file)
    barrier()
    logger.info("calibration data: %s", file)
    return CalibrationSet.load(file)


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
) -> CalibrationSet:
    """Draw cali_n pictures, and return the UNet's inputs at cali_st of their timesteps.

    Prompts are taken in turn, and picture i starts from the noise of seed + i. Samples are in the order of timesteps;
    at each of them come the pictures in batches, [without prompt; with prompt] where both branches are kept.
    facts: kept with the data.
    """
    pictures = options.effort.cali_n
    unet = pipeline.prepare(settings).model.diffusion_model
    calls = chosen_calls(settings.steps_taken, options.effort.cali_st)
    size = min(pictures, MAX_BATCH)
    steps: list[list[tuple[Tensor, ...]]] = [[] for _ in calls]
    with tqdm(total=pictures, desc="calibration data", unit="picture", disable=rank() != 0) as bar:
        for start in range(0, pictures, size):
            numbers = range(start, min(start + size, pictures))
            texts = [prompts[i % len(prompts)] for i in numbers]
            with recorded_inputs(unet, calls) as kept:
                pipeline.sample(texts, [options.seed + i for i in numbers], settings)
            for step, values in zip(steps, kept, strict=True):
                step.append(values if options.cond else _with_prompt(values, len(texts)))
            bar.update(len(texts))
    x, t, *context = (
        torch.cat(tensors) for tensors in zip(*(values for step in steps for values in step), strict=True)
    )
    return CalibrationSet(x, t, context[0] if context else None, dict(facts))


def _with_prompt(values: tuple[Tensor, ...], pictures: int) -> tuple[Tensor, ...]:
    """Return the part with prompt of a call's inputs: the second half of a guided call, all of another one."""
    return tuple(value[-pictures:] for value in values)
