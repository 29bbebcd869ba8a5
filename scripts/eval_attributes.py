#!/usr/bin/env python
"""Do the pictures show what their captions ask for? python scripts/eval_attributes.py --n 256

Draws captions of the procedural data set, generates their pictures with the embedded model, reads these with a
small detector, and counts how often colour, shape, texture, size, number of objects and relation are right. What a
caption leaves open is not judged. Beside the generated pictures stand two ceilings: `rendered`, real pictures of the
same captions, and `autoencoder`, these after encoding and decoding. Split `test` has combinations of words
that training showed, each caption of `heldout` one that it did not.

With --images DIR it judges the PNGs of a folder instead, as scripts/txt2img.py writes them (prompt inside).
Writes attributes.json, a sheet of pictures with their captions, and prompts-SPLIT.txt for txt2img's --from-file.
"""

# ruff: noqa: E402
import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from ldm.data.reader import ShapesReader, judge
from ldm.data.shapes import SceneSpec, ShapesDataset, caption, parse_caption
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import initial_noise
from ldm.util import load_model_from_config

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
ATTRIBUTES = ("color", "shape", "texture", "size", "count", "relation")

Verdict = dict[str, bool]
Counts = dict[str, dict[str, float]]  # attribute -> right, n, percent, low, high


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--n", type=int, default=256, help="captions of each split")
    parser.add_argument("--split", default="both", choices=["test", "heldout", "both"])
    parser.add_argument("--sampler", default="ddim", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance; 1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--images", type=Path, help="judge the PNGs of this folder instead of generating")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/attributes"))
    parser.add_argument("--config", default=str(ROOT / "configs/shapes/txt2img.yaml"))
    parser.add_argument("--ckpt", default=str(ROOT / "models/ldm/shapes/model.safetensors"))
    parser.add_argument("--reader", type=Path, default=ROOT / "models/ldm/shapes/reader.safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.n < 1 or args.batch_size < 1 or args.steps < 1 or args.seed < 0:
        parser.error("--n, --batch_size and --steps must be at least 1, --seed at least 0")
    return args


# -------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def generate(
    model: torch.nn.Module, captions: Sequence[str], seeds: Sequence[int], sampler: str, steps: int, scale: float
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], one a caption, each from the noise of its own seed."""
    shape = (model.channels, model.image_size, model.image_size)
    samples, _ = SAMPLERS[sampler](model).sample(
        S=steps,
        batch_size=len(captions),
        shape=shape,
        conditioning=model.get_learned_conditioning(list(captions)),
        unconditional_guidance_scale=scale,
        unconditional_conditioning=model.get_learned_conditioning([""] * len(captions)) if scale != 1 else None,
        x_T=initial_noise(seeds, shape, model.device),
        verbose=False,
    )
    return model.decode_first_stage(samples).clamp(-1, 1)


@torch.no_grad()
def through_autoencoder(model: torch.nn.Module, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1], encoded to the mean of its latent and decoded."""
    first_stage = model.first_stage_model
    return first_stage.decode(first_stage.encode(images).mode()).clamp(-1, 1)


def tensor_of(picture: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def picture_of(image: Tensor) -> Image.Image:
    """The inverse of `tensor_of`."""
    return Image.fromarray(((image.permute(1, 2, 0).cpu() + 1) * 127.5).round().to(torch.uint8).numpy())


def read_folder(folder: Path) -> tuple[list[SceneSpec], list[Image.Image]]:
    """Captions and pictures of the PNGs in `folder`; ValueError where one holds no prompt of the grammar."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"no PNG in {folder}: give the samples folder of a txt2img run")
    pictures = [Image.open(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if "prompt" not in picture.info:
            raise ValueError(f"{path} holds no prompt: pictures must come from scripts/txt2img.py")
    return [parse_caption(picture.info["prompt"]) for picture in pictures], pictures


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
    side, text, columns = pictures[0].width, 72, 8
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
    specs: Sequence[SceneSpec],
    sources: dict[str, Callable[[slice], Tensor]],
    reader: ShapesReader,
    batch_size: int,
) -> tuple[dict[str, list[Verdict]], list[Image.Image]]:
    """Verdicts by source, and the pictures of the first one. A source gives images for a slice of `specs`."""
    verdicts: dict[str, list[Verdict]] = {name: [] for name in sources}
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(specs), batch_size), unit="batch"):
        part = slice(start, min(start + batch_size, len(specs)))
        for name, images_of in sources.items():
            images = images_of(part)
            seen = reader.read(images.to(reader.device))
            verdicts[name] += [judge(spec, objects) for spec, objects in zip(specs[part], seen, strict=True)]
            if name == next(iter(sources)):
                pictures += [picture_of(image) for image in images]
    return verdicts, pictures


def sources_of_split(args: argparse.Namespace, model: torch.nn.Module, data: ShapesDataset) -> dict:
    """The three ways to a picture of item i: generated, real after the autoencoder, real."""
    captions = [caption(data.spec(i)) for i in range(len(data))]

    def rendered(part: slice) -> Tensor:
        return torch.stack([tensor_of(data.picture(i)) for i in range(part.start, part.stop)])

    def generated(part: slice) -> Tensor:
        seeds = [args.seed + i for i in range(part.start, part.stop)]
        return generate(model, captions[part], seeds, args.sampler, args.steps, args.scale)

    def decoded(part: slice) -> Tensor:
        return through_autoencoder(model, rendered(part).to(model.device))

    return {"generated": generated, "autoencoder": decoded, "rendered": rendered}


def report(outdir: Path, split: str, specs: Sequence[SceneSpec], verdicts: dict, pictures: list) -> dict[str, Counts]:
    """Print the table of a split, write its sheet and its captions, return its figures."""
    rows = {source: count(found) for source, found in verdicts.items()}
    tqdm.write(table(split, rows) + "\n")
    captions = [caption(spec) for spec in specs]
    shown = slice(0, 64)
    first = next(iter(verdicts.values()))
    page = sheet(pictures[shown], captions[shown], first[shown])
    _write(outdir / f"sheet-{split}.png", lambda path: page.save(path, format="PNG"))
    _write(outdir / f"prompts-{split}.txt", lambda path: path.write_text("\n".join(captions) + "\n"))
    return rows


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Never leaves a half-written file."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


def run(args: argparse.Namespace) -> None:
    args.outdir.mkdir(parents=True, exist_ok=True)
    reader = ShapesReader.from_file(args.reader).to(args.device)
    figures = {}
    if args.images:
        specs, ready = read_folder(args.images)
        sources = {"images": lambda part: torch.stack([tensor_of(picture) for picture in ready[part]])}
        figures["images"] = report(args.outdir, "images", specs, *evaluate(specs, sources, reader, args.batch_size))
    else:
        model = load_model_from_config(OmegaConf.load(args.config), args.ckpt, device=args.device)
        for split in ("test", "heldout") if args.split == "both" else (args.split,):
            data = ShapesDataset(args.n, split, seed=args.seed)
            specs = [data.spec(i) for i in range(args.n)]
            found = evaluate(specs, sources_of_split(args, model, data), reader, args.batch_size)
            figures[split] = report(args.outdir, split, specs, *found)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    content = json.dumps({"settings": settings, "figures": figures}, indent=2)
    _write(args.outdir / "attributes.json", lambda path: path.write_text(content + "\n"))


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one line that says what is wrong with the input."""
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"eval_attributes.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
