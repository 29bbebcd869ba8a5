"""Drawing pictures into a folder for those who measure them: in batches that do not depend on who draws them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from dsdiff.images.png import to_pictures, write_png
from dsdiff.pipeline import ModelChoice, SamplingOptions, build_model, choose_model, decode, sample, sampling_options
from qdiff.distributed import rank, world_size


def model_of(flags: Sequence[str], *, packed: bool = True) -> tuple[nn.Module, ModelChoice, SamplingOptions]:
    """The model and the options that these flags of txt2img.py mean; what to draw is not among them.

    packed: ready to run. Otherwise a quantized model has the layers that calibration knows.
    """
    args, choice, options = options_of(flags)
    if options.quantization is not None and not packed:
        options = replace(options, quantization=replace(options.quantization, engine=None))
    return build_model(args, choice, options), choice, options


def options_of(flags: Sequence[str]) -> tuple[argparse.Namespace, ModelChoice, SamplingOptions]:
    """What these flags mean, before any weights are read. ValueError or OSError for flags that cannot be."""
    from scripts import txt2img

    args = txt2img.parse_args(["--prompt", "-", *flags])
    choice = choose_model(args)
    return args, choice, sampling_options(args, choice)


def draw_missing(
    build: Callable[[], tuple[nn.Module, SamplingOptions]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    paths: Sequence[Path],
    batch_size: int,
    title: str,
) -> None:
    """Draw the pictures that are not there, a PNG each with its prompt and seed. Several processes share the batches.

    build: makes the model, if there is anything to draw. Batches are always the same, so that an interrupted run ends
    with the same pictures, bit for bit.
    """
    starts = range(0, len(paths), batch_size)
    parts = [slice(start, start + batch_size) for start in starts][rank() :: world_size()]
    todo = [part for part in parts if not all(path.exists() for path in paths[part])]
    if not todo:
        return
    model, options = build()
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(len(paths[part]) for part in todo), desc=title, unit="picture", disable=rank() != 0) as bar:
        for part in todo:
            images = decode(model, sample(model, prompts[part], seeds[part], options))
            for path, prompt, seed, picture in zip(
                paths[part], prompts[part], seeds[part], to_pictures(images), strict=True
            ):
                if not path.exists():
                    write_png(path, picture, {"prompt": prompt, "seed": str(seed)})
            bar.update(len(images))


def read_prompt_file(path: Path, flag: str) -> list[str]:
    """The prompts in a text file, one a line, that `flag` names. Raises ValueError if it holds none or is no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {str(path)!r} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} {str(path)!r} holds no prompts: write one per line")
    return prompts
