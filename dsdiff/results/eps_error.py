"""The error of eps in one step: what quantization changes in a prediction, for the same latents.

The float model draws pictures whose captions and noise no calibration saw, and each quantized UNet gets the latents of
its steps, see `dsdiff.metrics.eps_errors`. A hundred times fewer pictures tell two calibrations apart than by the
pictures themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dsdiff.metrics.eps_errors import EpsErrors
from dsdiff.metrics.intervals import mean_and_error
from dsdiff.models.spec import find_model
from dsdiff.options import CALIBRATION_ENGINE, QuantizationOptions
from dsdiff.pipeline import Pipeline
from dsdiff.results.quantization_cost import captions_of
from dsdiff.results.variants import DRAWING, MODEL
from qdiff.checkpoint import CaliHeader, read_cali_header

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
    spec = find_model(MODEL, accept_bundle=False)
    exact = Pipeline(spec, device=device)
    errors = EpsErrors(exact, exact.resolve(DRAWING), captions_of(n, seed), FIRST_SEED + seed, batch_size)
    rows = []
    for file, header in zip(tqdm(files, "eps", unit="file"), headers, strict=True):
        found = {}
        for act in (False, True) if header.config.quant_act else (False,):
            quantization = QuantizationOptions(cali_ckpt=file, quant_act=act, engine=CALIBRATION_ENGINE)
            pipeline = Pipeline(spec, device=device, quantization=quantization)
            each = errors.of(pipeline.resolve(DRAWING), file.name, pipeline).mean(1)
            found[act] = mean_and_error(each)
        bits = f"W{header.config.weight_bit}" + (f"A{header.config.act_bit}" if header.config.quant_act else "A32")
        (weights, weights_error), (both, both_error) = found[False], found.get(True, (None, None))
        row = {"weights": weights, "weights_error": weights_error, "all": both, "all_error": both_error}
        rows.append(EpsRow(file=str(file), rounding=_rounding(header), bits=bits, **row))
    return rows


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
