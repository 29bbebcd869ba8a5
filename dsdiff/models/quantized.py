"""Drawing with a calibrated model: what the flags of quantization ask for, and doing it."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsdiff.cli.console import logger
from dsdiff.cli.flags import QUANTIZATION_FLAGS, given_flags
from ldm.fileio import file_sha256
from qdiff.checkpoint import CaliHeader, check_flags, load_cali_ckpt, read_cali_header
from qdiff.config import QuantConfig
from qdiff.engine.backends.expanding import low_memory
from qdiff.engine.backends.simulated import ReferenceLayer
from qdiff.engine.lower import fits_bytes, kernels_for, pack
from qdiff.quant_model import QuantModel

BIT_FLAGS = ("weight_bit", "act_bit", "sm_abit")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantized model. cali_ckpt: the file. bits: in short, such as "W4A8 sm16 split". engine: one of ENGINES, or
    None for the layers that calibration knows. quant_act: whether activations are quantized, which may be off where
    config, the file's, has it on. low_memory, cond, no_grad_ckpt: as the flags."""

    cali_ckpt: str
    cali_sha256: str
    bits: str
    engine: str | None
    quant_act: bool
    low_memory: bool
    cond: bool
    no_grad_ckpt: bool
    config: QuantConfig

    @property
    def effective(self) -> QuantConfig:
        """How the model is quantized, whatever else the file has."""
        return replace(self.config, quant_act=self.quant_act)


def choose_quantization(
    args: argparse.Namespace, shipped: Mapping[int, Path], device: torch.device, packed: Path | None = None
) -> Quantization | None:
    """What --ptq and its group ask for; None without. Reads the header of the cali_ckpt.

    device: on which the model will be. shipped: the cali_ckpts that come with the model, by the bits of its weights.
    packed: the checkpoint, if it is one of scripts/export.py, which is quantized whatever the flags are.
    Raises ValueError for a flag without effect, one that contradicts the file, or an engine that cannot run it;
    FileNotFoundError without a file.
    """
    request = _request(args, shipped, packed)
    if request is None:
        return None
    path, header = request
    engine = _engine(args.engine, replace(header.config, quant_act=_acts(header, args)), device)
    if args.low_memory and (engine != "int8" or header.config.weight_bit > 4):
        raise ValueError("--low_memory has no effect: it is for weights of 4 bits or less and --engine int8")
    return Quantization(
        cali_ckpt=str(path),
        cali_sha256=file_sha256(path),
        bits=_in_short(header, args),
        engine=engine,
        quant_act=_acts(header, args),
        low_memory=bool(args.low_memory),
        cond=bool(args.cond),
        no_grad_ckpt=bool(args.no_grad_ckpt),
        config=header.config,
    )


def quantize(model: nn.Module, quantization: Quantization, precision: str = "full") -> None:
    """Quantize a LatentDiffusion's UNet, in place. precision: autocast or full, in which it will draw."""
    qnn = QuantModel(model.model.diffusion_model, quantization.config)
    load_cali_ckpt(qnn, quantization.cali_ckpt)
    install(model, qnn, quantization, precision)


def install(model: nn.Module, qnn: QuantModel, quantization: Quantization, precision: str) -> None:
    """Make a calibrated UNet the model's, run by the engine that was chosen. precision: autocast or full."""
    if quantization.cond and model.model.conditioning_key is None:
        raise ValueError("--cond is given, but the model takes no condition: leave it out")
    if quantization.no_grad_ckpt:
        switch_grad_checkpoint_off(qnn)
    qnn.set_quant_state(True, quantization.quant_act)
    model.model.diffusion_model = qnn
    config = quantization.effective
    if quantization.engine == "int8":
        kernels = kernels_for(config, model.device)
        pack(qnn, low_memory(kernels) if quantization.low_memory else kernels)
    elif quantization.engine == "simulate" and fits_bytes(config):
        # Under autocast what is not a product is that of the integer engine, whose rounding would differ otherwise.
        pack(qnn, ReferenceLayer, fast=model.device.type == "cpu" and precision == "autocast")


def _engine(wanted: str | None, config: QuantConfig, device: torch.device) -> str:
    """The engine asked for, or int8 where it can run and is the faster one. ValueError if it cannot be had."""
    if wanted == "simulate" or (wanted is None and device.type != "cpu"):
        return "simulate"
    try:
        kernels_for(config, device)
    except ValueError as error:
        if wanted is None:
            return "simulate"
        raise ValueError(f"--engine {wanted}: {error}; use --engine simulate") from error
    return "int8"


def switch_grad_checkpoint_off(unet: nn.Module) -> None:
    """Let no block of a UNet recompute its activations in a backward pass."""
    for module in unet.modules():
        for name in ("use_checkpoint", "checkpoint"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, False)


def _request(
    args: argparse.Namespace, shipped: Mapping[int, Path], packed: Path | None
) -> tuple[Path, CaliHeader] | None:
    if not hasattr(args, "ptq"):  # a command that does not draw with quantized models
        return None
    given = given_flags(args, QUANTIZATION_FLAGS)
    if packed is not None and "cali_ckpt" in given:
        raise ValueError(f"--cali_ckpt has no effect: {str(packed)!r} is calibrated already; leave it out")
    if packed is None and "ptq" not in given:
        if given:
            flags = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"without --ptq nothing is quantized, so {flags} has no effect: add --ptq")
        return None
    path = packed or cali_ckpt_of(args, shipped)
    header = read_cali_header(path, **{name: given[name] for name in BIT_FLAGS if name in given})
    if header.inferred:
        logger.info("%s does not say %s: told by its numbers", path.name, ", ".join(header.inferred))
    wanted = {name: given.get(name) for name in (*BIT_FLAGS, "split")}
    wanted["quant_act"] = given.get("quant_act") or None  # weights alone can be had of any file
    check_flags(header, wanted, str(path))
    mode = header.calibration.get("quant_mode", "qdiff")
    if given.get("quant_mode", mode) != mode:
        raise ValueError(f"--quant_mode is {given['quant_mode']}, but {str(path)!r} was made with quant_mode {mode}")
    if not _acts(header, args) and (idle := [name for name in ("act_bit", "sm_abit") if name in given]):
        flags = ", ".join(f"--{name}" for name in idle)
        raise ValueError(f"activations stay float, so {flags} has no effect: leave it out, or add --quant_act")
    return path, header


def cali_ckpt_of(args: argparse.Namespace, shipped: Mapping[int, Path]) -> Path:
    """What --cali_ckpt gives, else the one that comes with the model. ValueError or FileNotFoundError without any."""
    return Path(args.cali_ckpt) if args.cali_ckpt is not None else _shipped(args.weight_bit, shipped)


def _shipped(bits: int | None, shipped: Mapping[int, Path]) -> Path:
    if not shipped:
        raise ValueError(
            "this model comes with no calibration, --ptq needs a --cali_ckpt: scripts/calibrate.py makes one"
        )
    if bits is not None and bits not in shipped:
        known = " and ".join(map(str, shipped))
        raise ValueError(f"--weight_bit is {bits}, but the model's cali_ckpts have {known} bits: give --cali_ckpt")
    path = shipped[bits or min(shipped)]
    if not path.is_file():
        raise FileNotFoundError(
            f"no cali_ckpt at {str(path)!r}: make one with scripts/calibrate.py, give it by --cali_ckpt"
        )
    return path


def _acts(header: CaliHeader, args: argparse.Namespace) -> bool:
    return header.config.quant_act and args.quant_act is not False


def _in_short(header: CaliHeader, args: argparse.Namespace) -> str:
    config: Any = header.config
    parts = [f"W{config.weight_bit}A{config.act_bit if _acts(header, args) else 32}"]
    if _acts(header, args):
        parts.append(f"sm{config.sm_abit}")
    if config.split:
        parts.append("split")
    return " ".join(parts)
