"""The data of a calibration: prompts, drawn with the float model, kept on disk."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dsdiff.cli.console import logger
from dsdiff.jobs import read_prompt_file
from dsdiff.pipeline import EMBEDDED, STABLE_DIFFUSION, ModelChoice, SamplingOptions, choose_device, sample
from ldm.fileio import file_sha256
from qdiff.calibration_set import CalibrationSet, chosen_calls, recorded_inputs
from qdiff.distributed import barrier, rank

PROMPTS = {config: config.parent / "cali_prompts.txt" for config in (EMBEDDED, STABLE_DIFFUSION)}


def read_prompts(args: argparse.Namespace, choice: ModelChoice) -> tuple[Path, list[str]]:
    """The file of prompts, and its lines. Raises ValueError if it holds none, or none is known."""
    path = args.prompts or PROMPTS.get(choice.config_path.resolve())
    if path is None:
        raise ValueError(f"no prompts are known for {choice.description}: give --prompts FILE or --data_path FILE")
    return Path(path), read_prompt_file(Path(path), "--prompts")


def calibration_data(
    args: argparse.Namespace, choice: ModelChoice, options: SamplingOptions, model: nn.Module
) -> CalibrationSet:
    """The data that the flags mean: read, found from an earlier run, or collected and kept."""
    if args.data_path is not None:
        data = CalibrationSet.load(args.data_path, args.cali_st, args.cali_n)
    else:
        data = collected(args, choice, options, model)
    unet = model.model.diffusion_model
    width = None if data.context is None else data.context.shape[2]
    if (data.x.shape[1], width) != (unet.in_channels, unet.context_dim):
        raise ValueError(
            f"the calibration data has {data.x.shape[1]} channels and a context of {width}, the model "
            f"{unet.in_channels} and {unet.context_dim}: it is of another model"
        )
    return data.subset(args.num_samples or len(data), args.seed)


def collected(
    args: argparse.Namespace, choice: ModelChoice, options: SamplingOptions, model: nn.Module
) -> CalibrationSet:
    """Drawn with the float model, or from the file that an earlier run left of the same."""
    path, prompts = read_prompts(args, choice)
    sampling = {name: value for name, value in asdict(options).items() if name not in ("merge", "quantization")}
    facts = {
        **choice.hashes,
        "prompts": path.name,
        "prompts_sha256": file_sha256(path),
        "sampling": sampling,
        "seed": args.seed,
        "cali_st": args.cali_st,
        "cali_n": args.cali_n,
        "cond": bool(args.cond),
        "device": choose_device(args.device).type,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = args.outdir / f"data-{key}.safetensors"
    if not file.exists() and rank() == 0:
        args.outdir.mkdir(parents=True, exist_ok=True)
        collect(model, prompts, options, args, facts).save(file)
    barrier()
    logger.info("calibration data: %s", file)
    return CalibrationSet.load(file)


def collect(
    model: nn.Module, prompts: Sequence[str], options: SamplingOptions, args: argparse.Namespace, facts: dict[str, Any]
) -> CalibrationSet:
    """The inputs of the UNet at --cali_st timesteps of --cali_n pictures, prompts in turn, picture i from seed + i."""
    if args.cond and options.scale == 1:
        raise ValueError("--cond: with --scale 1 there is no branch without the prompt: leave one of them out")
    parts: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    calls = chosen_calls(options.steps_taken, args.cali_st)
    size = min(args.cali_n, 16)
    with tqdm(total=args.cali_n, desc="calibration data", unit="picture", disable=rank() != 0) as bar:
        for start in range(0, args.cali_n, size):
            numbers = range(start, min(start + size, args.cali_n))
            texts = [prompts[i % len(prompts)] for i in numbers]
            with recorded_inputs(model.model.diffusion_model, calls) as kept:
                sample(model, texts, [args.seed + i for i in numbers], options)
            for step, values in enumerate(kept):
                parts.setdefault(step, []).append(branches(values, len(texts), options.scale != 1, bool(args.cond)))
            bar.update(len(texts))
    in_order = [values for step in sorted(parts) for values in parts[step]]
    x, t, *context = (torch.cat(tensors) for tensors in zip(*in_order, strict=True))
    return CalibrationSet(x, t, context[0] if context else None, facts)


def branches(values: tuple[torch.Tensor, ...], pictures: int, guided: bool, both: bool) -> tuple[torch.Tensor, ...]:
    """Of a call's inputs, [without prompt; with prompt] where it is guided, both branches or the latter alone."""
    return tuple(value if both or not guided else value[-pictures:] for value in values)
