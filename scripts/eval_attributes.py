#!/usr/bin/env python
"""Do the pictures show what their captions ask for? python scripts/eval_attributes.py --n 256

Draws captions of the procedural data set, generates their pictures with the embedded model, reads these with a small
detector, and counts how often colour, shape, texture, size, number of objects and relation are right. What a caption
leaves open is not judged. Beside the generated pictures stand two ceilings: `rendered`, real pictures of the same
captions, and `autoencoder`, these after encoding and decoding. The captions of split `test` hold combinations that
training showed, each caption of `heldout` at least one that it did not. --seed draws the captions, and the noise.

With --images DIR it judges the PNGs of a folder instead, as scripts/txt2img.py writes them (prompt inside).
Writes attributes.json (figures, and what they were got with), a sheet of pictures with their captions, and
prompts-SPLIT.txt for txt2img's --from-file.
"""

# ruff: noqa: E402
import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.cli.flags import (
    add_model_arguments,
    add_noise_arguments,
    add_quantization_arguments,
    add_sampler_arguments,
    add_tome_arguments,
)
from dsdiff.images.png import to_pictures, write_png
from dsdiff.pipeline import (
    EMBEDDED,
    SamplingOptions,
    build_model,
    choose_device,
    choose_model,
    decode,
    sample,
    sampling_options,
    versions,
)
from ldm.data.reader import ShapesReader, judge
from ldm.data.shapes import SceneSpec, ShapesDataset, caption, parse_caption
from ldm.fileio import check_writable, file_sha256, write_atomically

READER = ROOT / "models/ldm/shapes/reader.safetensors"
WITH_IMAGES = ("images", "outdir", "reader", "device", "n_samples", "verbose")  # flags that --images leaves a meaning
ATTRIBUTES = ("color", "shape", "texture", "size", "count", "relation")

Verdict = dict[str, bool]
Counts = dict[str, dict[str, float]]  # attribute -> right, n, percent, low, high
Source = Callable[[slice], Tensor]  # which captions -> their pictures [B, 3, H, W] in [0, 1]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what to judge").add_argument
    add("--n", type=number(int, 1), default=256, metavar="N", help="captions of each split (default: %(default)s)")
    add("--captions", default="both", choices=["test", "heldout", "both"], help="of which part (default: %(default)s)")
    add("--images", type=Path, metavar="DIR", help="judge the PNGs of DIR instead of generating")
    add("--reader", type=Path, default=READER, metavar="FILE", help="the detector's weights (default: %(default)s)")
    add("--outdir", type=Path, default=Path("outputs/attributes"), metavar="DIR", help="default: %(default)s")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    add_model_arguments(parser, config="the embedded model's; no other knows the captions")
    add_sampler_arguments(parser)
    add_noise_arguments(parser)
    add_tome_arguments(parser)
    add_quantization_arguments(parser)
    parser.set_defaults(config=str(EMBEDDED), seed=0, n_samples=16)
    args = parser.parse_args(argv)
    if args.images is not None:
        refuse_generation(parser, argv, args)
    return args


def refuse_generation(parser: ArgumentParser, argv: Sequence[str], args: argparse.Namespace) -> None:
    """Leave with an error if a flag stands on the command line that --images gives no meaning."""
    without_defaults = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = [name for name, value in vars(parser.parse_args(argv, without_defaults)).items() if value is not None]
    idle = [name for name in given if name not in WITH_IMAGES]
    if idle:
        flags = ", ".join(f"--{name}" for name in idle)
        parser.error(f"with --images nothing is generated, so {flags} has no effect: leave it out")


# -------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def through_autoencoder(model: nn.Module, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], encoded to the mean of their latents and decoded."""
    posterior = model.encode_first_stage(images.to(model.device) * 2 - 1)
    return decode(model, model.get_first_stage_encoding(posterior.mode()))


def tensor_of(pictures: Sequence[Image.Image]) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    return torch.from_numpy(pixels / 255).permute(0, 3, 1, 2)


def sources_of_split(
    model: nn.Module, options: SamplingOptions, data: ShapesDataset, captions: Sequence[str], seed: int
) -> dict[str, Source]:
    """The three ways to the pictures of the captions of `data`; picture i starts from the noise of seed + i."""

    def rendered(part: slice) -> Tensor:
        return tensor_of([data.picture(i) for i in range(part.start, part.stop)])

    def generated(part: slice) -> Tensor:
        seeds = [seed + i for i in range(part.start, part.stop)]
        return decode(model, sample(model, captions[part], seeds, options))

    def decoded(part: slice) -> Tensor:
        return through_autoencoder(model, rendered(part))

    return {"generated": generated, "autoencoder": decoded, "rendered": rendered}


def read_folder(folder: Path) -> tuple[list[SceneSpec], list[Image.Image]]:
    """Captions and pictures of the PNGs in `folder`; ValueError where one holds no prompt of the grammar."""
    specs: list[SceneSpec] = []
    pictures: list[Image.Image] = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as file:
            if "prompt" not in file.info:
                raise ValueError(f"{str(path)!r} holds no prompt: pictures must come from scripts/txt2img.py")
            specs.append(parse_caption(file.info["prompt"]))
            pictures.append(file.convert("RGB"))
        if pictures[-1].size != pictures[0].size:
            raise ValueError(f"{str(path)!r} is {pictures[-1].size}, the first is {pictures[0].size}: use one size")
    if not pictures:
        raise ValueError(f"no PNG in {str(folder)!r}: give the samples folder of a txt2img run")
    return specs, pictures


# -------------------------------------------------------------------------------------------- figures


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, in [0, 1] (Wilson 1927)."""
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def count(verdicts: Iterable[Verdict]) -> Counts:
    """Right answers by attribute over all objects; an attribute that no caption asks for is absent."""
    answers: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, right in verdict.items():
            answers.setdefault(name.split()[0], []).append(right)
    return {name: _share(answers[name]) for name in ATTRIBUTES if name in answers}


def _share(answers: list[bool]) -> dict[str, float]:
    right, n = sum(answers), len(answers)
    low, high = wilson(right, n)
    return {
        "right": right,
        "n": n,
        "percent": round(100 * right / n, 2),
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
    }


def table(split: str, rows: dict[str, Counts]) -> str:
    """A line a source, a column an attribute: percent right and its interval."""
    first = next(iter(rows.values()))
    titles = (f"{name} n={c['n']}" for name, c in first.items())
    lines = [f"{split:<12}" + "".join(f"{title:>20}" for title in titles)]
    for source, counts in rows.items():
        cells = (f"{c['percent']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in counts.values())
        lines.append(f"{source:<12}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], verdicts: Sequence[Verdict]) -> Image.Image:
    """Pictures in rows of eight, the caption under each, and what is wrong with it in red."""
    side, text, columns = pictures[0].width, 92, 8
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, words, verdict) in enumerate(zip(pictures, captions, verdicts, strict=True)):
        x, y = i % columns * (side + 8), i // columns * (side + text)
        page.paste(picture, (x, y))
        draw.text((x + 2, y + side), "\n".join(textwrap.wrap(words, side // 6)), fill="black")
        wrong = ", ".join(name for name, right in verdict.items() if not right)
        draw.text((x + 2, y + side + text - 14), wrong[: side // 5], fill="red")
    return page


# --------------------------------------------------------------------------------------------- the run


def evaluate(
    specs: Sequence[SceneSpec], sources: dict[str, Source], reader: ShapesReader, batch_size: int
) -> tuple[dict[str, list[Verdict]], list[Image.Image]]:
    """Verdicts by source, and the pictures of the first source."""
    verdicts: dict[str, list[Verdict]] = {name: [] for name in sources}
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(specs), batch_size), unit="batch"):
        part = slice(start, min(start + batch_size, len(specs)))
        batches = {name: images_of(part) for name, images_of in sources.items()}
        for name, images in batches.items():
            seen = reader.read(images.to(reader.device) * 2 - 1)
            verdicts[name] += [judge(spec, objects) for spec, objects in zip(specs[part], seen, strict=True)]
        pictures += to_pictures(next(iter(batches.values())))
    return verdicts, pictures


def report(
    outdir: Path,
    split: str,
    specs: Sequence[SceneSpec],
    verdicts: dict[str, list[Verdict]],
    pictures: Sequence[Image.Image],
) -> dict[str, Counts]:
    """Print the table of a split, write its sheet and its captions, return its figures by source."""
    rows = {source: count(found) for source, found in verdicts.items()}
    tqdm.write(table(split, rows) + "\n")
    captions = [caption(spec) for spec in specs]
    shown = slice(0, 64)
    first = next(iter(verdicts.values()))
    write_png(outdir / f"sheet-{split}.png", sheet(pictures[shown], captions[shown], first[shown]))
    write_atomically(
        outdir / f"prompts-{split}.txt", lambda path: path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    )
    return rows


def evaluate_folder(args: argparse.Namespace, reader: ShapesReader) -> dict[str, dict[str, Counts]]:
    specs, ready = read_folder(args.images)
    sources = {"images": lambda part: tensor_of(ready[part])}
    return {"images": report(args.outdir, "images", specs, *evaluate(specs, sources, reader, args.n_samples))}


def evaluate_model(
    args: argparse.Namespace, model: nn.Module, options: SamplingOptions, reader: ShapesReader
) -> dict[str, dict[str, Counts]]:
    figures = {}
    for split in ("test", "heldout") if args.captions == "both" else (args.captions,):
        data = ShapesDataset(args.n, split, options.height, args.seed)
        specs = [data.spec(i) for i in range(args.n)]
        sources = sources_of_split(model, options, data, [caption(spec) for spec in specs], args.seed)
        found = evaluate(specs, sources, reader, args.n_samples)
        figures[split] = report(args.outdir, split, specs, *found)
    return figures


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The content of attributes.json: arguments, files by their hashes, versions, figures."""
    reader = ShapesReader.from_file(args.reader).to(choose_device(args.device))
    given = {name: value for name, value in vars(args).items() if value is not None}
    facts = {"arguments": given, "reader_sha256": file_sha256(args.reader), "versions": versions()}
    if args.images is not None:
        args.outdir.mkdir(parents=True, exist_ok=True)
        return facts | {"figures": evaluate_folder(args, reader)}
    choice = choose_model(args)
    logger.info("%s", choice)
    options = sampling_options(args, choice)
    facts |= {"options": asdict(options), **choice.hashes}
    model = build_model(args, choice, options)
    args.outdir.mkdir(parents=True, exist_ok=True)
    return facts | {"figures": evaluate_model(args, model, options, reader)}


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        check_writable(args.outdir)
        content = json.dumps(run(args), indent=2, default=str)
        write_atomically(
            args.outdir / "attributes.json", lambda path: path.write_text(content + "\n", encoding="utf-8")
        )


if __name__ == "__main__":
    main()
