"""Draw with a calibrated model: choose its settings from options and file, and put the quantized UNet in place."""

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsdiff.models.bundle import is_bundle
from dsdiff.models.spec import ModelSpec
from dsdiff.options import CALIBRATION_ENGINE, QuantizationOptions
from ldm.fileio import file_sha256
from ldm.models.diffusion.ddpm import LatentDiffusion
from qdiff.checkpoint import CaliHeader, check_settings, load_cali_ckpt, read_cali_header
from qdiff.config import QuantConfig
from qdiff.engine.backends.expanding import expanding
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.features import has_triton
from qdiff.engine.layers import IntegerLayer, LayerSpec, MakeLayer
from qdiff.engine.lower import backend_for, fits_bytes, lower
from qdiff.quant_model import QuantModel

logger = logging.getLogger(__name__)

BIT_SETTINGS = ("weight_bit", "act_bit", "sm_abit")
LAYERS = 16  # integer layers between two looks at memory
LOW_MEMORY_BITS = 4  # of weights, up to which keeping them packed saves memory


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantized model, all choices made.

    cali_ckpt, cali_sha256: the file. bits: in short, such as "W4A8 sm16 split". engine: int8, simulate, or None for the
    layers that calibration knows. quant_act: whether activations are quantized, which may be off where `config`, the
    file's, has it on. low_memory, cond, no_grad_ckpt: see QuantizationOptions.
    """

    cali_ckpt: str
    cali_sha256: str
    bits: str
    engine: str | None
    quant_act: bool
    low_memory: bool
    cond: bool
    no_grad_ckpt: bool
    config: QuantConfig

    def __str__(self) -> str:
        if self.config.quant_act and not self.quant_act:
            return f"{self.bits}, weights only; --quant_act adds the file's {self.config.act_bit}-bit activations"
        return self.bits

    @property
    def effective(self) -> QuantConfig:
        """How the model is quantized, whatever else the file has."""
        return replace(self.config, quant_act=self.quant_act)


# --- choosing ----------------------------------------------------------------------------------------------


def resolve_quantization(
    options: QuantizationOptions | None,
    spec: ModelSpec,
    device: torch.device,
    note: Callable[[str], object] = logger.info,
) -> Quantization | None:
    """Return what the options mean for a model on a device; None for a float one. Reads the header of the file.

    A bundle is quantized also without options. note: called with a line where a file leaves settings to be inferred.
    Raises ValueError for an option without effect, one that contradicts the file, or an engine that cannot run it;
    FileNotFoundError without a file.
    """
    if options is None and not spec.bundle:
        return None
    check_quantizable(spec)
    options = options or QuantizationOptions()
    path = _file(options, spec)
    header = read_cali_header(path, **_given(options, BIT_SETTINGS))
    if header.inferred:
        note(f"{path.name} does not say {', '.join(header.inferred)}: told by its numbers")
    _check_against(options, header, path)
    quant_act = _quantizes_activations(options, header)
    engine = choose_engine(options.engine, replace(header.config, quant_act=quant_act), device)
    if options.low_memory and (engine != "int8" or header.config.weight_bit > LOW_MEMORY_BITS):
        raise ValueError(
            f"--low_memory has no effect: it is for weights of {LOW_MEMORY_BITS} bits or less and --engine int8"
        )
    return Quantization(
        cali_ckpt=str(path),
        cali_sha256=file_sha256(path),
        bits=_in_short(header.config, quant_act),
        engine=engine,
        quant_act=quant_act,
        low_memory=options.low_memory,
        cond=options.cond,
        no_grad_ckpt=options.no_grad_ckpt,
        config=header.config,
    )


def check_quantizable(spec: ModelSpec) -> None:
    """Raise ValueError for a model that cannot be quantized, by its config."""
    if spec.embeds_guidance:
        raise ValueError(
            f"{spec.description} takes the scale of guidance as an input (time_cond_proj_dim) and cannot be quantized: "
            "quantize the model from which it was distilled, and draw with an LCM-LoRA"
        )


def cali_ckpt_of(cali_ckpt: Path | None, weight_bit: int | None, shipped: Mapping[int, Path]) -> Path:
    """Return the given cali_ckpt, else the one of `weight_bit` bits (or the fewest) that comes with the model.

    Raises ValueError or FileNotFoundError without any.
    """
    if cali_ckpt is not None:
        return cali_ckpt
    if not shipped:
        raise ValueError("this model comes with no calibration: give a --cali_ckpt, scripts/calibrate.py makes one")
    if weight_bit is not None and weight_bit not in shipped:
        known = " and ".join(map(str, shipped))
        raise ValueError(
            f"--weight_bit is {weight_bit}, but the model's cali_ckpts have {known} bits: give --cali_ckpt"
        )
    path = shipped[weight_bit or min(shipped)]
    if not path.is_file():
        raise FileNotFoundError(
            f"no cali_ckpt at {str(path)!r}: make one with scripts/calibrate.py, give it by --cali_ckpt"
        )
    return path


def choose_engine(wanted: str | None, config: QuantConfig, device: torch.device) -> str | None:
    """Return the engine asked for, or int8 where it can run and is the faster one: on CPUs, and GPUs with our kernels.

    None stands for the layers that calibration knows. Raises ValueError if the engine cannot be had.
    """
    if wanted == CALIBRATION_ENGINE:
        return None
    if wanted == "simulate" or (wanted is None and device.type != "cpu" and not has_triton(device)):
        return "simulate"
    try:
        backend_for(config, device)
    except ValueError as error:
        if wanted is None:
            return "simulate"
        raise ValueError(f"--engine {wanted}: {error}; use --engine simulate") from error
    return "int8"


def _file(options: QuantizationOptions, spec: ModelSpec) -> Path:
    if not spec.bundle:
        if options.cali_ckpt is not None and is_bundle(options.cali_ckpt):
            raise ValueError(f"{str(options.cali_ckpt)!r} is a whole model, which draws alone: give it with --ckpt")
        return cali_ckpt_of(options.cali_ckpt, options.weight_bit, spec.cali_ckpts)
    if options.cali_ckpt is not None:
        raise ValueError(f"--cali_ckpt has no effect: {str(spec.ckpt)!r} is calibrated already; leave it out")
    return spec.ckpt


def _given(options: QuantizationOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _quantizes_activations(options: QuantizationOptions, header: CaliHeader) -> bool:
    """Return whether activations are quantized.

    As in the original work, --quant_act alone decides once bits, split or mode are named; else the file does.
    """
    if options.quant_act is not None:
        return options.quant_act and header.config.quant_act
    return header.config.quant_act and not options.names_settings


def _check_against(options: QuantizationOptions, header: CaliHeader, path: Path) -> None:
    """Raise ValueError for options that contradict the file, or that its way of reading leaves without effect."""
    wanted = {name: getattr(options, name) for name in (*BIT_SETTINGS, "act_range", "split")}
    wanted["quant_act"] = options.quant_act or None  # weights alone can be had of any file
    check_settings(header, wanted, str(path))
    mode = header.calibration.get("quant_mode", "qdiff")
    if options.quant_mode not in (None, mode):
        raise ValueError(f"--quant_mode is {options.quant_mode}, but {str(path)!r} was made with quant_mode {mode}")
    idle = _given(options, ("act_bit", "sm_abit", "act_range"))
    if idle and not _quantizes_activations(options, header):
        flags = ", ".join(f"--{name}" for name in idle)
        raise ValueError(f"activations stay float, so {flags} has no effect: leave it out, or add --quant_act")


def _in_short(config: QuantConfig, quant_act: bool) -> str:
    parts = [f"W{config.weight_bit}A{config.act_bit if quant_act else 32}"]
    if quant_act:
        parts.append(f"sm{config.sm_abit}")
        wider = sorted(set(config.mixed_act.values()))
        parts += ["dynamic"] if config.act_range == "dynamic" else []
        parts += [f"{list(config.mixed_act.values()).count(bits)}xA{bits}" for bits in wider]
    if config.split:
        parts.append("split")
    return " ".join(parts)


# --- putting it in place -----------------------------------------------------------------------------------


def quantize(model: LatentDiffusion, quantization: Quantization) -> None:
    """Quantize a LatentDiffusion's UNet, in place."""
    qnn = QuantModel(model.model.diffusion_model, quantization.config)
    load_cali_ckpt(qnn, quantization.cali_ckpt)
    install(model, qnn, quantization)


def install(
    model: LatentDiffusion,
    qnn: QuantModel,
    quantization: Quantization,
    *,
    made: Callable[[], object] = lambda: None,
) -> None:
    """Make a calibrated UNet the model's, run by the engine that was chosen.

    made: called now and then while integer layers are made, to free what they were of.
    """
    if quantization.cond and model.model.conditioning_key is None:
        raise ValueError("--cond is given, but the model takes no condition: leave it out")
    if quantization.no_grad_ckpt:
        switch_grad_checkpoint_off(qnn)
    qnn.set_quant_state(True, quantization.quant_act)
    model.model.diffusion_model = qnn
    config = quantization.effective
    if quantization.engine == "int8":
        backend = backend_for(config, model.device)
        lower(qnn, _telling(expanding(backend) if quantization.low_memory else backend, made))
    elif quantization.engine == "simulate" and fits_bytes(config):
        # On a CPU all but the products is that of the integer engine, whose rounding would differ otherwise.
        lower(qnn, SimulatedLayer, blocks=model.device.type == "cpu")


def _telling(backend: MakeLayer, made: Callable[[], object]) -> MakeLayer:
    """Return a backend that calls `made` after every LAYERS layers."""
    layers = itertools.count(1)

    def make(spec: LayerSpec) -> IntegerLayer:
        layer = backend(spec)
        if next(layers) % LAYERS == 0:
            made()
        return layer

    return make


def switch_grad_checkpoint_off(unet: nn.Module) -> None:
    """Let no block of a UNet recompute its activations in a backward pass."""
    for module in unet.modules():
        for name in ("use_checkpoint", "checkpoint"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, False)
