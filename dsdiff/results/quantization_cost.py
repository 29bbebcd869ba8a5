"""The costs of quantization: the same captions from the same noise, in full precision and in few bits, side by side.

The figures are the PSNR to the full-precision pictures, the share of attributes that are right, and the bytes of the
UNet's weights. Calibrations and pictures are kept, so that an interrupted run goes on where it stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dsdiff.benchmark.comparison import weight_bytes
from dsdiff.calibration import PRESETS, ready_made
from dsdiff.environment import versions
from dsdiff.metrics.attributes import answers
from dsdiff.metrics.intervals import wilson
from dsdiff.metrics.pair_scores import psnr, psnr_interval, squared_errors
from dsdiff.models.registry import READER
from dsdiff.models.spec import find_model
from dsdiff.options import CALIBRATION_ENGINE, QuantizationOptions
from dsdiff.results.drawing import DrawModel, DrawTask
from dsdiff.results.variants import DRAWING, MODEL, SHIPPED, Variant
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption
from ldm.fileio import file_sha256
from qdiff.distributed import barrier

SHEET_COLUMNS, SHEET_SIDE = 8, 128  # pictures in a row of the sheet, and the most pixels of their sides there
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """How the costs are measured.

    n: pictures of each variant. preset: of the calibrations. outdir: for all files. batch_size: pictures drawn at a
    time. seed: of captions and noise. device: auto, cpu, cuda or cuda:N.
    """

    n: int = 256
    preset: str = "fast"
    outdir: Path = Path("outputs/quantization")
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("n", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be a whole number of {low} or more")
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}: it must be one of {', '.join(PRESETS)}")


# --- calibrations and pictures -----------------------------------------------------------------------------


def captions_of(n: int, seed: int) -> list[str]:
    """Return n captions: half of combinations that training showed, half of others."""
    parts = ((ShapesDataset(n, "test", 128, seed), n - n // 2), (ShapesDataset(n, "heldout", 128, seed), n // 2))
    return [caption(data.spec(i)) for data, count in parts for i in range(count)]


def cali_ckpt_of(variant: Variant, options: CostOptions) -> Path | None:
    """Return the variant's cali_ckpt: the one that comes with the model, or one that is made if it is not there.

    All that are made are made of the same data, drawn like that of the shipped ones. Under torchrun all processes call
    this. None for full precision.
    """
    if variant.calibration is None:
        return None
    calibration = variant.calibration.of(options.preset)
    if options.preset == "fast" and calibration in SHIPPED and SHIPPED[calibration].is_file():
        return SHIPPED[calibration]
    root = options.outdir / "calibrations" / options.preset
    ready = sorted(root.glob("*/data-*.safetensors"))
    barrier()  # all have looked: the first calibration leaves its data there
    data_path = ready[0] if ready else None
    return ready_made(root / calibration.key, calibration.options(options.preset, options.device, data_path))


def plan(variant: Variant, cali_ckpt: Path | None, captions: Sequence[str], options: CostOptions) -> DrawTask:
    """Return the drawing of a variant's pictures."""
    quantization = None
    if cali_ckpt is not None:
        quantization = QuantizationOptions(cali_ckpt=cali_ckpt, quant_act=None if variant.quant_act else False)
    model = DrawModel(spec=find_model(MODEL), device=options.device, quantization=quantization)
    return DrawTask.plan(
        model,
        replace(DRAWING, merge=variant.merge),
        title=variant.name,
        prompts=captions,
        seed=options.seed,
        batch_size=options.batch_size,
        root=options.outdir / "pictures",
        name=variant.name.replace(" ", "_").replace(",", ""),
    )


def pictures_of(variant: Variant, cali_ckpt: Path | None, captions: Sequence[str], options: CostOptions) -> Tensor:
    """Return a variant's pictures, uint8 [N, H, W, 3], drawn if they are not there."""
    task = plan(variant, cali_ckpt, captions, options)
    task.draw()
    barrier()
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in task.paths])


# --- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A row of the table.

    psnr: in dB, to full precision, over all pictures, with its 95% interval; None where all pictures are equal, whose
    PSNR is infinite. attributes: right ones in percent of those `asked` for, with the interval low, high. bytes: of
    the UNet's weights.
    """

    variant: str
    psnr: float | None
    psnr_low: float | None
    psnr_high: float | None
    attributes: float
    low: float
    high: float
    asked: int
    bytes: int


def costs(variants: Sequence[Variant], options: CostOptions) -> Iterator[tuple[Cost, Tensor]]:
    """Yield the row and the pictures, uint8 [N, H, W, 3], of each variant. The first one is the reference."""
    captions = captions_of(options.n, options.seed)
    reader = ShapesReader.from_file(READER)
    reference = None
    for variant in variants:
        cali_ckpt = cali_ckpt_of(variant, options)
        pictures = pictures_of(variant, cali_ckpt, captions, options)
        reference = pictures if reference is None else reference
        errors = squared_errors(pictures, reference)
        low, high = psnr_interval(errors.numpy(), captions, RESAMPLES, options.seed)
        right, asked = attributes_right(pictures, captions, reader, options.batch_size)
        least, most = wilson(right, asked)
        cost = Cost(
            variant=variant.name,
            psnr=psnr(errors) if errors.any() else None,
            psnr_low=low,
            psnr_high=high if high is not None and np.isfinite(high) else None,
            attributes=100 * right / asked,
            low=100 * least,
            high=100 * most,
            asked=asked,
            bytes=bytes_of(cali_ckpt, options.device),
        )
        yield cost, pictures


def attributes_right(pictures: Tensor, captions: Sequence[str], reader: ShapesReader, batch: int) -> tuple[int, int]:
    """Return how many attributes are right, and how many the captions ask for. pictures: uint8 [N, H, W, 3]."""
    told: list[bool] = []
    for start in range(0, len(pictures), batch):
        part = slice(start, start + batch)
        told += answers(pictures[part].permute(0, 3, 1, 2), captions[part], reader)
    return sum(told), len(told)


def bytes_of(cali_ckpt: Path | None, device: str) -> int:
    """Return the bytes of the UNet's weights as a cali_ckpt stores them; in float32 without one."""
    quantization = None
    if cali_ckpt is not None:
        quantization = QuantizationOptions(cali_ckpt=cali_ckpt, engine=CALIBRATION_ENGINE)
    return weight_bytes(DrawModel(spec=find_model(MODEL), device=device, quantization=quantization).open())


# --- what is written ---------------------------------------------------------------------------------------


def content(rows: Sequence[Cost], options: CostOptions) -> Mapping[str, Any]:
    """Return the content of the JSON file."""
    return {
        "n": options.n,
        "preset": options.preset,
        "seed": options.seed,
        "drawing": {name: value for name, value in asdict(DRAWING).items() if value},
        "versions": versions(),
        "reader_sha256": file_sha256(READER),
        "rows": [asdict(row) for row in rows],
    }


def markdown(rows: Sequence[Cost]) -> str:
    """Return the table."""
    lines = ["| | PSNR, dB | attributes right, % | UNet weights, MB |", "|---|---|---|---|"]
    for row in rows:
        quality = "-" if row.psnr is None else f"{row.psnr:.1f}"
        if row.psnr_low is not None and row.psnr_high is not None:
            quality += f" [{row.psnr_low:.1f}, {row.psnr_high:.1f}]"
        lines.append(
            f"| {row.variant} | {quality} | {row.attributes:.1f} [{row.low:.1f}, {row.high:.1f}] "
            f"| {row.bytes / 1e6:.2f} |"
        )
    return "\n".join(lines)


def shown(pictures: Tensor) -> Tensor:
    """Return the few of a variant's pictures, [N, H, W, 3], that the sheet shows."""
    return pictures[:: max(1, len(pictures) // SHEET_COLUMNS)][:SHEET_COLUMNS]


def sheet(rows: Sequence[Tensor], names: Sequence[str]) -> Image.Image:
    """Return the pictures of each variant in a row, its name above. rows: uint8 [N, H, W, 3] each, square."""
    side, text = min(rows[0].shape[1], SHEET_SIDE), 16
    page = Image.new("RGB", (len(rows[0]) * (side + 4), len(rows) * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, (pictures, name) in enumerate(zip(rows, names, strict=True)):
        pen.text((2, i * (side + text) + 2), name, fill="black")
        for j, picture in enumerate(pictures):
            small = Image.fromarray(picture.numpy()).resize((side, side), Image.Resampling.BOX)
            page.paste(small, (j * (side + 4), i * (side + text) + text))
    return page
