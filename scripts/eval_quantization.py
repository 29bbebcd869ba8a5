#!/usr/bin/env python
"""What quantization costs, in one table: python scripts/eval_quantization.py

Draws the same captions from the same noise with the full-precision embedded model and with quantized ones, by rounding
to nearest (linear) and by Q-Diffusion (qdiff), and compares: PSNR to the full-precision pictures, the share of
attributes that are right (colour, shape, texture, size, count and relation together, read as by
scripts/eval_attributes.py), and the bytes of the UNet's weights. --ablation takes Q-Diffusion apart instead.

Calibrations and pictures are kept in OUTDIR, and made only if they are not there: an interrupted run goes on with the
same command. With torchrun the processes share the work, which is fastest with one a core:
torchrun --nproc_per_node 2 scripts/eval_quantization.py. Writes OUTDIR/quantization.json or ablation.json, the table
as markdown beside it, and a sheet of pictures, a row a variant.
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.benchmark.comparison import weight_bytes
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.cli.launch import own_device, processes
from dsdiff.images.png import write_png
from dsdiff.jobs import draw_missing, model_of
from dsdiff.pipeline import CALI_CKPTS, CHECKPOINTS, EMBEDDED, SamplingOptions, choose_device, versions
from ldm.data.reader import ShapesReader, judge
from ldm.data.shapes import ShapesDataset, caption, parse_caption
from ldm.fileio import check_writable, file_sha256, write_atomically
from qdiff.distributed import barrier, rank
from scripts import calibrate
from scripts.eval_attributes import READER, tensor_of, wilson

SAMPLER = ["--dpm_solver", "--ddim_steps", "20", "--precision", "full"]
SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table. cali: the flags of its calibration, None for full precision; draw: those of drawing."""

    name: str
    cali: tuple[str, ...] | None = None
    draw: tuple[str, ...] = ()

    @property
    def cali_name(self) -> str:
        """The folder of its calibration, the same for all variants of the same flags."""
        return "".join(flag.replace("--", "_") if flag.startswith("--") else flag for flag in self.cali or ()).strip(
            "_"
        )


def bits(weight: int, *more: str) -> tuple[str, ...]:
    """The flags of a calibration."""
    return ("--weight_bit", str(weight), "--quant_act", "--act_bit", "8", "--sm_abit", "16", *more)


# Weights are learned before activations: those of W4A8 are those of W4A32.
FLOAT_ACTS = ("--no-quant_act",)
LINEAR, SPLIT, MERGE = ("--quant_mode", "linear"), ("--split",), ("--ratio", "0.5")
SHIPPED = {bits(width, *SPLIT): path for width, path in CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]].items()}
TABLE = (
    Variant(name="full precision"),
    Variant(name="W8A8 linear", cali=bits(8, *LINEAR)),
    Variant(name="W8A8 qdiff", cali=bits(8, *SPLIT)),
    Variant(name="W4A32 linear", cali=bits(4, *LINEAR), draw=FLOAT_ACTS),
    Variant(name="W4A32 qdiff", cali=bits(4, *SPLIT), draw=FLOAT_ACTS),
    Variant(name="W4A8 linear", cali=bits(4, *LINEAR)),
    Variant(name="W4A8 qdiff", cali=bits(4, *SPLIT)),
    Variant(name="ratio 0.5", draw=MERGE),
    Variant(name="W4A8 linear, ratio 0.5", cali=bits(4, *LINEAR), draw=MERGE),
    Variant(name="W4A8 qdiff, ratio 0.5", cali=bits(4, *SPLIT), draw=MERGE),
)
ABLATION = (
    Variant(name="full precision"),
    Variant(name="W4A8 qdiff", cali=bits(4, *SPLIT)),
    Variant(name="without split", cali=bits(4)),
    Variant(name="without AdaRound", cali=bits(4, *SPLIT, "--iters_w", "0")),
    Variant(name="without LSQ", cali=bits(4, *SPLIT, "--iters_a", "0")),
    Variant(name="calibrated plain, drawn merged", cali=bits(4, *SPLIT), draw=MERGE),
    Variant(name="calibrated merged, drawn merged", cali=bits(4, *SPLIT, *MERGE), draw=MERGE),
    Variant(name="calibrated merged, drawn plain", cali=bits(4, *SPLIT, *MERGE)),
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--n", type=number(int, 2), default=256, metavar="N", help="pictures of each variant (default: %(default)s)")
    add("--ablation", action="store_true", help="the parts of Q-Diffusion, in place of the table")
    add("--preset", choices=list(calibrate.PRESETS), default="fast", help="of the calibrations (default: %(default)s)")
    add("--outdir", type=Path, default=Path("outputs/quantization"), metavar="DIR", help="default: %(default)s")
    add("--n_samples", type=number(int, 1), default=16, metavar="N", help="pictures per batch (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of captions and noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    return parser.parse_args(argv)


# --- calibrations and pictures -----------------------------------------------------------------------------


def captions_of(n: int, seed: int) -> list[str]:
    """Half of them of combinations that training showed, half held out."""
    parts = ((ShapesDataset(n, "test", 128, seed), n - n // 2), (ShapesDataset(n, "heldout", 128, seed), n // 2))
    return [caption(data.spec(i)) for data, count in parts for i in range(count)]


def cali_ckpt_of(variant: Variant, args: argparse.Namespace) -> Path | None:
    """The variant's calibration: that which comes with the model, or one that is made if it is not there.

    All that are made are so with the same data, collected as that of the shipped ones was.
    """
    if variant.cali is None:
        return None
    if args.preset == "fast" and SHIPPED.get(variant.cali, Path()).is_file():
        return SHIPPED[variant.cali]
    root = args.outdir / "calibrations" / args.preset
    folder = root / variant.cali_name
    ready = sorted(root.glob("*/data-*.safetensors"))
    barrier()  # all have looked: the first calibration leaves its data there
    data = ["--data_path", str(ready[0])] if ready else ["--cond", *SAMPLER]
    learn = [] if "linear" in variant.cali else ["--no_grad_ckpt"]
    flags = ["--config", str(EMBEDDED), "--preset", args.preset, "--device", args.device]
    return calibrate.ready_made(folder, [*variant.cali, *flags, *data, *learn])


def pictures_of(variant: Variant, args: argparse.Namespace, captions: Sequence[str]) -> Tensor:
    """uint8 [N, H, W, 3], drawn if they are not there."""
    cali = cali_ckpt_of(variant, args)
    files = [CHECKPOINTS[EMBEDDED][0], *([cali] if cali else [])]
    facts = [
        *captions,
        *variant.draw,
        *SAMPLER,
        str(args.seed),
        choose_device(args.device).type,
        *map(file_sha256, files),
    ]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = args.outdir / "pictures" / f"{variant.name.replace(' ', '_').replace(',', '')}-{key}"
    paths = [folder / f"{i:05}.png" for i in range(len(captions))]
    seeds = [args.seed + i for i in range(len(captions))]

    def build() -> tuple[nn.Module, SamplingOptions]:
        flags = ["--config", str(EMBEDDED), "--device", args.device, *SAMPLER, *variant.draw]
        model, _, options = model_of([*flags, *(["--ptq", "--cali_ckpt", str(cali)] if cali else [])])
        return model, options

    draw_missing(build, captions, seeds, paths, args.n_samples, variant.name)
    barrier()
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths])


# --- figures -----------------------------------------------------------------------------------------------


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """In dB, of the squared error averaged over all of uint8 [N, H, W, 3]; inf where they are equal."""
    error = float((pictures.double() - reference.double()).square().mean()) / 255**2
    return -10 * math.log10(error) if error else math.inf


def attributes_right(pictures: Tensor, captions: Sequence[str], reader: ShapesReader, batch: int) -> tuple[int, int]:
    """How many of all attributes that the captions ask for are right, and how many they ask for."""
    answers: list[bool] = []
    for start in range(0, len(pictures), batch):
        part = [Image.fromarray(picture.numpy()) for picture in pictures[start : start + batch]]
        seen = reader.read(tensor_of(part) * 2 - 1)
        specs = [parse_caption(text) for text in captions[start : start + batch]]
        answers += [right for spec, objects in zip(specs, seen, strict=True) for right in judge(spec, objects).values()]
    return sum(answers), len(answers)


def bytes_of(cali: Path | None) -> int:
    """Of the embedded model's UNet, as a cali_ckpt has it, or in float32."""
    return weight_bytes(["--config", str(EMBEDDED), *(["--ptq", "--cali_ckpt", str(cali)] if cali else [])])


def figures(variants: Sequence[Variant], args: argparse.Namespace, sheet: list[Tensor]) -> Iterator[dict[str, Any]]:
    """A row a variant; its first pictures are appended to `sheet`."""
    captions = captions_of(args.n, args.seed)
    reader = ShapesReader.from_file(READER)
    reference = None
    for variant in variants:
        pictures = pictures_of(variant, args, captions)
        sheet.append(pictures[:: max(1, len(pictures) // SHEET_COLUMNS)][:SHEET_COLUMNS])
        reference = pictures if reference is None else reference
        quality = psnr(pictures, reference)
        right, asked = attributes_right(pictures, captions, reader, args.n_samples)
        low, high = wilson(right, asked)
        yield {
            "variant": variant.name,
            "psnr": quality if quality != math.inf else None,
            "attributes": 100 * right / asked,
            "low": 100 * low,
            "high": 100 * high,
            "asked": asked,
            "bytes": bytes_of(cali_ckpt_of(variant, args)),
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | PSNR, dB | attributes right, % | UNet weights, MB |", "|---|---|---|---|"]
    for row in rows:
        quality = "-" if row["psnr"] is None else f"{row['psnr']:.1f}"
        lines.append(
            f"| {row['variant']} | {quality} | {row['attributes']:.1f} [{row['low']:.1f}, {row['high']:.1f}] "
            f"| {row['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def sheet_of(rows: Sequence[Tensor], names: Sequence[str]) -> Image.Image:
    """The pictures of each variant in a row, its name above."""
    side, text = rows[0].shape[1], 16
    page = Image.new("RGB", (len(rows[0]) * (side + 4), len(rows) * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, (pictures, name) in enumerate(zip(rows, names, strict=True)):
        pen.text((2, i * (side + text) + 2), name, fill="black")
        for j, picture in enumerate(pictures):
            page.paste(Image.fromarray(picture.numpy()), (j * (side + 4), i * (side + text) + text))
    return page


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose), processes():
        args.device = str(own_device(args.device))
        check_writable(args.outdir)
        variants, name = (ABLATION, "ablation") if args.ablation else (TABLE, "quantization")
        pictures: list[Tensor] = []
        rows = list(figures(variants, args, pictures))
        if rank() != 0:
            return
        table = markdown(rows)
        facts = {"n": args.n, "preset": args.preset, "seed": args.seed, "sampler": SAMPLER, "versions": versions()}
        content = json.dumps({**facts, "reader_sha256": file_sha256(READER), "rows": rows}, indent=2)
        write_atomically(args.outdir / f"{name}.json", lambda path: path.write_text(content + "\n", encoding="utf-8"))
        write_atomically(args.outdir / f"{name}.md", lambda path: path.write_text(table + "\n", encoding="utf-8"))
        write_png(args.outdir / f"{name}.png", sheet_of(pictures, [variant.name for variant in variants]))
        print(table)


if __name__ == "__main__":
    main()
