"""The bytes that a calibration writes: data, finished steps, activations that memory does not hold, the cali_ckpt."""

from collections.abc import Mapping

from dsdiff.calibration.data import DataPlan
from qdiff.bitpack import packed_bytes
from qdiff.calibrate import Step
from qdiff.quant_model import QuantModel
from qdiff.quantizers import DynamicQuantizer

ENTRY = 76  # bytes of a tensor in the header of a .safetensors, beside its name
HEADER = 400  # bytes of the rest of a header, the report of a step included
FACTS = 6000  # bytes of the header of a cali_ckpt, and of the report, beside those of units
UNIT_REPORT = 260  # bytes of a unit in the report


def weight_entries(qnn: QuantModel) -> dict[str, int]:
    """Return the bytes of the codes and ranges of each weight, as tensors of a file."""
    sizes: dict[str, int] = {}
    for name, layer in qnn.layers().items():
        for part_name, part in layer.weight_parts().items():
            codes = len(part) * packed_bytes(tuple(part.shape), qnn.config.weight_bit)
            full = f"{name}.{part_name}"
            sizes |= {f"{full}.codes": codes, f"{full}.delta": 4 * len(part), f"{full}.zero_point": 4 * len(part)}
    return sizes


def act_entries(qnn: QuantModel) -> dict[str, int]:
    """Return the bytes of the ranges of all activations, as tensors of a file."""
    quantizers = qnn.act_quantizers().items()
    names = [name for name, quantizer in quantizers if not isinstance(quantizer, DynamicQuantizer)]
    return {f"{name}.{what}": 4 for name in names for what in ("delta", "zero_point")}


def file_bytes(entries: Mapping[str, int]) -> int:
    """Return the bytes of a .safetensors file with these tensors."""
    return HEADER + sum(ENTRY + len(name) + size for name, size in entries.items())


def step_bytes(qnn: QuantModel, step: Step) -> int:
    """Return the bytes that a finished step takes in the progress folder."""
    if step.phase == "fitting":
        return file_bytes({name: size for name, size in weight_entries(qnn).items() if not name.endswith(".codes")})
    entries = weight_entries(qnn) if step.phase == "weights" else act_entries(qnn)
    return file_bytes({name: size for name, size in entries.items() if not step.unit or _within(name, step.unit)})


def target_bytes(qnn: QuantModel, format: str, steps: list[Step]) -> int:
    """Return the bytes of the cali_ckpt, and of the report beside it."""
    report = FACTS + UNIT_REPORT * sum(bool(step.unit) for step in steps)
    if format == "qdiff":  # float weights, and an alpha for each that is quantized
        names = dict(qnn.named_parameters())
        alphas = sum(layer.weight.numel() for layer in qnn.layers().values())
        return report + 4 * (sum(each.numel() for each in names.values()) + alphas) + 250 * len(names)
    return report + FACTS + file_bytes(weight_entries(qnn) | act_entries(qnn))


def disk_bytes(qnn: QuantModel, plan: DataPlan, steps: list[Step], format: str, cached: int, finished: int = 0) -> int:
    """Return the most that a calibration has on disk at a time, beside what was there before.

    cached: bytes of activations that memory does not hold. finished: how many of the steps were there.
    """
    data = plan.bytes_written
    progress = sum(step_bytes(qnn, step) for step in steps[finished:])
    return max(2 * data, data + progress + max(cached, target_bytes(qnn, format, steps)))


def _within(name: str, unit: str) -> bool:
    return name.startswith(f"{unit}.")
