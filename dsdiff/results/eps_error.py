"""The error of eps in one step: what quantization changes in a prediction, for the same latents.

The float model draws pictures whose captions and noise no calibration saw, and what its UNet gets on the way is kept.
Then each quantized UNet gets the same. So errors do not add up over the steps, and a hundred times fewer pictures tell
two calibrations apart than by the pictures themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsdiff.metrics.intervals import mean_and_error
from dsdiff.models.spec import find_model
from dsdiff.pipeline import Pipeline
from dsdiff.results.quantization_cost import captions_of
from dsdiff.results.variants import DRAWING, MODEL
from ldm.models.diffusion.guidance import guide
from qdiff.calibration_set import chosen_calls, recorded_inputs
from qdiff.checkpoint import CaliHeader, load_cali_ckpt, read_cali_header
from qdiff.quant_model import QuantModel

CALLS = 10  # steps of a picture that are measured
FIRST_SEED = 10**6  # of the noise; calibrations begin at small ones


@dataclass(frozen=True, kw_only=True)
class EpsRow:
    """The mean squared errors of guided eps by a cali_ckpt.

    rounding: of its weights, as its header says; empty if it does not. weights: with float activations. all: with
    activations as the file has them; None if it has none. Each has its standard error, over pictures.
    """

    file: str
    rounding: str
    bits: str
    weights: float
    weights_error: float
    all: float | None
    all_error: float | None


def eps_rows(files: Sequence[Path], *, n: int, seed: int, batch_size: int, device: str) -> list[EpsRow]:
    """Measure cali_ckpts of the embedded model. n: pictures. seed: of captions and noise. batch_size: pictures at once.

    Raises ValueError or OSError for a file that is none of this model's.
    """
    headers = [read_cali_header(file) for file in files]  # errors come before the work
    pipeline = Pipeline(find_model(MODEL, accept_bundle=False), device=device)
    settings = pipeline.resolve(DRAWING)
    unet = pipeline.prepare(settings).model.diffusion_model
    batches = []
    captions, calls = captions_of(n, seed), chosen_calls(settings.steps_taken, CALLS)
    for start in tqdm(range(0, n, batch_size), "latents", unit="batch"):
        chosen = captions[start : start + batch_size]
        with recorded_inputs(unet, calls) as kept:
            pipeline.sample(chosen, [FIRST_SEED + seed + start + i for i in range(len(chosen))], settings)
        batches.append(kept)
    exact = _guided(unet, batches, settings.scale, pipeline.device)
    rows = []
    for file, header in zip(tqdm(files, "eps", unit="file"), headers, strict=True):
        qnn = QuantModel(unet, header.config)
        load_cali_ckpt(qnn, file)
        errors = {}
        for act in (False, True) if header.config.quant_act else (False,):
            qnn.set_quant_state(True, act)
            each = (_guided(qnn, batches, settings.scale, pipeline.device) - exact).square().mean(1)  # a picture each
            errors[act] = mean_and_error(each)
        unet = qnn.restore()
        name, rounding = str(file), _rounding(header)
        bits = f"W{header.config.weight_bit}" + (f"A{header.config.act_bit}" if header.config.quant_act else "A32")
        (weights, weights_error), (both, both_error) = errors[False], errors.get(True, (None, None))
        row = {"weights": weights, "weights_error": weights_error, "all": both, "all_error": both_error}
        rows.append(EpsRow(file=name, rounding=rounding, bits=bits, **row))
    return rows


@torch.no_grad()
def _guided(
    unet: nn.Module, batches: Sequence[Sequence[tuple[Tensor, ...]]], scale: float, device: torch.device
) -> Tensor:
    """Return guided eps of each picture at all recorded steps, float64 [pictures, steps * values]."""
    pictures = []
    for steps in batches:
        outputs = [unet(*(value.to(device) for value in values)).double().cpu() for values in steps]
        eps = outputs if scale == 1 else [guide(output, scale) for output in outputs]
        pictures.append(torch.cat([each.flatten(1) for each in eps], dim=1))
    return torch.cat(pictures)


def _rounding(header: CaliHeader) -> str:
    """Return the rounding of the file's weights. Older files of ours do not name it, and know two kinds."""
    recon = header.calibration.get("recon") or {}
    known = "" if header.format == "qdiff" else "adaround" if recon.get("iters_w") else "nearest"
    return header.calibration.get("rounding", known)


def eps_markdown(rows: Sequence[EpsRow]) -> str:
    """Return the table, in thousandths."""
    lines = ["| cali_ckpt | rounding | weights alone, 1e-3 | with activations, 1e-3 |", "|---|---|---|---|"]
    for row in rows:
        weights = f"{1e3 * row.weights:.2f} ± {1e3 * row.weights_error:.2f}"
        both = "-" if row.all is None or row.all_error is None else f"{1e3 * row.all:.2f} ± {1e3 * row.all_error:.2f}"
        lines.append(f"| {row.file} ({row.bits}) | {row.rounding or '-'} | {weights} | {both} |")
    return "\n".join(lines)
