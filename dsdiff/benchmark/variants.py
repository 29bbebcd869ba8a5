"""Our engines: UNets that compute the same in different ways.

float32, bf16: the float UNet, all of it in that dtype. fp16: the same on a GPU; fp16-channels-last: with feature maps
in that order; fp16-compile: compiled by torch.compile, without merging. simulate: quantized, integers held as floats,
in float32. int8: quantized, on integer kernels, with all else in bfloat16 where the hardware has it; int8-float32: with
all else in float32; int8-dynamic: with dynamic ranges of activations, and int8-dynamic-mixed with six inputs of 12
bits, too. On a CPU all tensors are channels_last, in which convolutions are fastest.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tomesd
from dsdiff.benchmark.operations import shares
from dsdiff.benchmark.options import (
    COMPILED,
    DEFAULT_ENGINES,
    DYNAMIC,
    DYNAMIC_MIXED,
    ENGINES,
    GPU_ENGINES,
    QUANTIZED_ENGINES,
)
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.timing import Timing, seconds_per_call
from dsdiff.environment import precision_context
from dsdiff.models.cuda_graph import GraphedUNet
from dsdiff.models.registry import CALI_CKPTS
from qdiff.calibration_set import CalibrationSet
from qdiff.checkpoint import load_cali_ckpt, quantized_bytes
from qdiff.config import QuantConfig
from qdiff.engine import cpu, step_cache
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.lower import backend_for, lower
from qdiff.engine.matching import nearest
from qdiff.observers import fit_activations
from qdiff.quant_model import QuantModel
from tomesd.merge import Nearest
from tomesd.options import MergeOptions

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}  # of the float engines
RECORDED = 3  # the calls after which a compiled UNet is compiled, and its CUDA graph recorded


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A UNet that is ready to be called.

    inputs: the arguments of a call. weight_bytes: size of its weights, as they would be stored. precision: of all that
    is not in integers, "autocast" or "full" (see `precision_context`). tokens: the share of tokens that are left
    without our merging: fewer than 1 in a UNet that merges by itself.
    """

    unet: nn.Module
    inputs: Mapping[str, Any]
    weight_bytes: int
    device: torch.device
    precision: str = "full"
    tokens: float = 1.0
    nearest: Nearest | None = None  # compares tokens that are to be merged

    @contextmanager
    def running(self, ratio: float) -> Iterator[Callable[[], Any]]:
        """Merge this share of the tokens within the block, and yield the function that calls the UNet (`merging`)."""
        with self.merging(MergeOptions(ratio=ratio) if ratio else None) as call:
            yield call

    @contextmanager
    def merging(self, merge: MergeOptions | None) -> Iterator[Callable[[], Any]]:
        """Merge tokens within the block, and yield the function that calls the UNet.

        All calls of a measurement are made within one block, like all steps of a picture, so that a lowered UNet keeps
        results between them (see `qdiff.engine.step_cache`). Afterwards the UNet is as it was.
        """
        if merge is not None:
            tomesd.apply_patch(self.unet, **asdict(merge), nearest=self.nearest)
        try:
            with torch.no_grad(), precision_context(self.device, self.precision), self._walk():
                yield lambda: self.unet(**self.inputs)
        finally:
            if merge is not None:
                tomesd.remove_patch(self.unet)

    def time(self, ratio: float, *, seconds: float, warm: bool, profiled: bool) -> Timing:
        """Measure calls, see `timing.Timeable`."""
        with self.running(ratio) as call:

            def measure(warm: bool) -> float:
                return seconds_per_call(call, self.device, seconds=seconds, warm=warm)

            return Timing(
                seconds=measure(warm),
                tokens=self._tokens() if ratio else self.tokens,
                shares=shares(lambda: measure(True), self.device) if profiled else None,
            )

    def _walk(self) -> Any:
        timesteps = self.inputs.get("timesteps")
        return step_cache.walk(self.unet, [] if timesteps is None else timesteps[:1].tolist())

    def _tokens(self) -> float:
        """Return the share of their tokens that the transformer blocks processed in the last call, while merging."""
        counts = tomesd.token_report(self.unet)
        return sum(count.tokens_processed for count in counts) / sum(count.tokens_in for count in counts)


# --- which can run -----------------------------------------------------------------------------------------


def quant_config(weight_bit: int) -> QuantConfig:
    """Return the config of the quantized engines: activations of 8 bits, softmax outputs of 16."""
    return QuantConfig(weight_bit=weight_bit, act_bit=8, quant_act=True, split=True, sm_abit=16)


def choose_engines(
    wanted: Sequence[str] | None,
    config: QuantConfig,
    device: torch.device,
    default: Sequence[str] = DEFAULT_ENGINES,
) -> tuple[list[str], dict[str, str]]:
    """Return the engines to measure, and for those that are left out the reasons.

    wanted: None for those of `default` that can run. Raises ValueError if one of them cannot.
    """
    reasons = {name: reason for name in wanted or default if (reason := why_not(name, config, device))}
    if wanted and reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"engine {name} cannot run: {reason}; leave it out")
    return [name for name in dict.fromkeys(wanted or default) if name not in reasons], reasons


def why_not(name: str, config: QuantConfig, device: torch.device) -> str | None:
    """Return why an engine cannot run here; None if it can."""
    if name in GPU_ENGINES and device.type != "cuda":
        return "it computes on a GPU"
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bfloat16"
    if name.startswith("int8"):
        try:
            backend_for(config, device)
        except ValueError as error:
            return str(error)
    return None


def float_precision(name: str, device: torch.device) -> str:
    """Return the precision of all that a quantized engine does not compute in integers."""
    fast = device.type != "cpu" or cpu.has_bfloat16()
    return "autocast" if name in ("int8", DYNAMIC, DYNAMIC_MIXED) and fast else "full"


# --- building ----------------------------------------------------------------------------------------------


def build(name: str, source: Source, config: QuantConfig) -> Engine:
    """Build one of ENGINES, with a UNet of its own. Raises ValueError for another name."""
    if name in DTYPES:
        return float_engine(source.unet(), source.inputs(), DTYPES[name])
    if name in GPU_ENGINES:
        return _half_engine(name, source)
    if name not in QUANTIZED_ENGINES:
        raise ValueError(f"engine {name!r} is unknown: it must be one of {', '.join(ENGINES)}")
    return _quantized_engine(name, source, config)


def float_engine(unet: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Engine:
    """Make a float UNet, ours or another library's, an engine that computes in `dtype` throughout."""
    unet = unet.to(dtype)
    if next(unet.parameters()).device.type == "cpu":
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Engine(
        unet=unet,
        inputs={name: suited(value, dtype) for name, value in inputs.items()},
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()),
        device=next(unet.parameters()).device,
    )


def _half_engine(name: str, source: Source) -> Engine:
    """Return the float UNet in float16, as it is, in channels_last order or compiled."""
    unet, inputs = source.unet(), source.inputs()
    if name == "fp16-channels-last":
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs |= {"x": inputs["x"].contiguous(memory_format=torch.channels_last)}
    engine = float_engine(unet, inputs, torch.float16)
    return _compiled(engine) if name == COMPILED else engine


def _compiled(engine: Engine) -> Engine:
    """Return the engine with its UNet compiled, so far that no timed call compiles anything."""
    engine = replace(engine, unet=torch.compile(engine.unet, mode="max-autotune"))
    with engine.running(0.0) as call:
        for _ in range(RECORDED):
            call()
    return engine


def suited(value: Any, dtype: torch.dtype) -> Any:
    """Return an argument as engines take it fastest: floats in `dtype`, on a CPU feature maps in channels_last."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    last = value.ndim == 4 and value.device.type == "cpu"
    return value.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)


def _quantized_engine(name: str, source: Source, config: QuantConfig) -> Engine:
    if name in (DYNAMIC, DYNAMIC_MIXED):
        config = replace(config, act_range="dynamic")
    qnn = QuantModel(source.unet(), config)
    if name == DYNAMIC_MIXED:
        qnn.mix_act(dict.fromkeys(wide_inputs(qnn), 12))
    fit(qnn, source)
    size = quantized_bytes(qnn)
    if name == "simulate":
        lower(qnn, SimulatedLayer, blocks=source.device.type == "cpu")
    else:
        lower(qnn, backend_for(config, source.device))
    unet = GraphedUNet(qnn) if name != "simulate" and source.device.type == "cuda" else qnn
    return Engine(
        unet=unet,
        inputs={name: suited(value, torch.float32) for name, value in source.inputs().items()},
        weight_bytes=size,
        device=source.device,
        precision=float_precision(name, source.device),
        nearest=nearest,
    )


def wide_inputs(qnn: QuantModel) -> list[str]:
    """Return six inputs of the kinds that calibration finds most sensitive: at both ends of the UNet, and in the end of
    its decoder."""
    names = list(qnn.input_quantizers())
    ends = ("out_layers.3.act_quantizer", "skip_connection.act_quantizer", "ff.net.2.act_quantizer")
    last = [[name for name in names if name.endswith(end)][-1:] for end in ends]
    second = [name for name in names if name.endswith("ff.net.2.act_quantizer")][-2:-1]
    return [names[0], names[-1], *itertools.chain(*last), *second]


def fit(qnn: QuantModel, source: Source) -> None:
    """Set the ranges of all quantizers, from the model's own cali_ckpt or else from one input of noise."""
    shipped = shipped_ranges(source, qnn.config)
    if shipped is not None:
        load_cali_ckpt(qnn, shipped)
        return
    qnn.fit_weights()
    x, timesteps, context = (tensor[:1] for tensor in source.inputs().values())
    fit_activations(qnn, CalibrationSet(x, timesteps, context), 1, running=True)
    qnn.set_quant_state(True, True)


def shipped_ranges(source: Source, config: QuantConfig) -> Path | None:
    """Return the cali_ckpt that comes with the model; None without one."""
    if config.act_range != "static":
        return None
    path = None if source.ckpt is None else CALI_CKPTS.get(source.ckpt, {}).get(config.weight_bit)
    return path if path is not None and path.is_file() else None
