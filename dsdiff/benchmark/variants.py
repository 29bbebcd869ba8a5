"""The engines that a benchmark compares: UNets that compute the same in different ways.

float32, bf16: the float UNet, all of it in that dtype. simulate: quantized, whole numbers held as floats, in float32.
int8: quantized, in integer kernels, what stands between them in bfloat16 where the hardware has it; int8-float32: in
float32. On a CPU all tensors are channels_last, in which convolutions are fastest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from dsdiff.benchmark.source import Source
from dsdiff.pipeline import CALI_CKPTS, precision_context
from qdiff.calibration_set import CalibrationSet, fit_activations
from qdiff.checkpoint import load_cali_ckpt, unet_bytes
from qdiff.config import QuantConfig
from qdiff.engine.backends.onednn import has_bfloat16
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.lower import kernels_for, pack
from qdiff.quant_model import QuantModel

FLOAT = {"float32": torch.float32, "bf16": torch.bfloat16}
QUANTIZED = ("simulate", "int8", "int8-float32")
ENGINES = (*FLOAT, *QUANTIZED)
DEFAULT = ENGINES[:-1]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A UNet that is ready to be called. inputs: its arguments. weight_bytes: of what computes, as it would be stored.
    precision: as precision_context has it."""

    unet: nn.Module
    inputs: Mapping[str, Any]
    weight_bytes: int
    device: torch.device
    precision: str = "full"

    @contextmanager
    def running(self, ratio: float) -> Iterator[Callable[[], Tensor]]:
        """Gives the call; while open, this part of the tokens is merged. Afterwards the UNet is as it was.

        It is one context for all calls of a measurement, as for all steps of a picture.
        """
        if ratio:
            tomesd.apply_patch(self.unet, ratio=ratio)
        try:
            with torch.no_grad(), precision_context(self.device, self.precision):
                yield lambda: self.unet(**self.inputs)
        finally:
            if ratio:
                tomesd.remove_patch(self.unet)

    def tokens(self) -> float:
        """The share of their tokens that the transformer blocks processed in the last call; while some are merged."""
        counts = tomesd.token_report(self.unet)
        return sum(count.tokens_processed for count in counts) / sum(count.tokens_in for count in counts)


# --- which can run -----------------------------------------------------------------------------------------


def choose_engines(
    wanted: Sequence[str] | None, config: QuantConfig, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """The engines to measure, and of those that are left out the reasons.

    wanted: None for all that can run; ValueError for one that cannot.
    """
    reasons = {name: reason for name in wanted or DEFAULT if (reason := why_not(name, config, device))}
    if wanted and reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"--engine {name}: {reason}; leave it out")
    return [name for name in dict.fromkeys(wanted or DEFAULT) if name not in reasons], reasons


def why_not(name: str, config: QuantConfig, device: torch.device) -> str | None:
    """Why an engine cannot run here; None if it can."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bfloat16"
    if name.startswith("int8"):
        try:
            kernels_for(config, device)
        except ValueError as error:
            return str(error)
    return None


def rest_precision(name: str, device: torch.device) -> str:
    """In what a quantized engine computes all that is not in whole numbers."""
    fast = device.type != "cpu" or has_bfloat16()
    return "autocast" if name == "int8" and fast else "full"


# --- building ----------------------------------------------------------------------------------------------


def build(name: str, source: Source, config: QuantConfig) -> Engine:
    """One of ENGINES, with a UNet of its own."""
    return float_engine(source.unet(), source.inputs(), FLOAT[name]) if name in FLOAT else _packed(name, source, config)


def float_engine(unet: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Engine:
    """A float UNet, ours or another's, in `dtype` as a whole."""
    unet = unet.to(dtype)
    if next(unet.parameters()).device.type == "cpu":
        unet = unet.to(memory_format=torch.channels_last)
    return Engine(
        unet=unet,
        inputs={name: suited(value, dtype) for name, value in inputs.items()},
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()),
        device=next(unet.parameters()).device,
    )


def suited(value: Any, dtype: torch.dtype) -> Any:
    """An argument as the engines like it: numbers in `dtype`, on a CPU feature maps in channels_last order."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    last = value.ndim == 4 and value.device.type == "cpu"
    return value.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)


def _packed(name: str, source: Source, config: QuantConfig) -> Engine:
    qnn = QuantModel(source.unet(), config)
    fit(qnn, source)
    size = unet_bytes(qnn)
    if name == "simulate":
        pack(qnn, ReferenceLayer, fast=False)
    else:
        pack(qnn, kernels_for(config, source.device))
    return Engine(
        unet=qnn,
        inputs={name: suited(value, torch.float32) for name, value in source.inputs().items()},
        weight_bytes=size,
        device=source.device,
        precision=rest_precision(name, source.device),
    )


def fit(qnn: QuantModel, source: Source) -> None:
    """Give all quantizers their ranges: those of the cali_ckpt that comes with the model, else of one noise."""
    shipped = shipped_ranges(source, qnn.config)
    if shipped is not None:
        load_cali_ckpt(qnn, shipped)
        return
    qnn.fit_weights()
    x, timesteps, context = (tensor[:1] for tensor in source.inputs().values())
    fit_activations(qnn, CalibrationSet(x, timesteps, context), 1, running=True)
    qnn.set_quant_state(True, True)


def shipped_ranges(source: Source, config: QuantConfig) -> Path | None:
    """The cali_ckpt that comes with the model; None without."""
    path = CALI_CKPTS.get(source.ckpt, {}).get(config.weight_bit)
    return path if path is not None and path.is_file() else None
