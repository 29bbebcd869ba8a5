"""The figures of a benchmark, as plain values for JSON, tables and the plot."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, least and most of several values."""

    median: float
    min: float
    max: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Self:
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration to measure: the name of an engine or peer, and the share of tokens it merges (0: none)."""

    engine: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class SettingFigures:
    """The speed of one setting. None means not measured.

    tokens: the share of tokens that the transformer blocks process. seconds: of a UNet call, over all repeats;
    seconds_by_repeat: in each of them.
    speedup, speedup_bf16, speedup_openvino: how many times as fast as float32, as bf16, and as OpenVINO's int8 (the
    faster one of its variants, which differ in the precision of the rest), each without merging, within a repeat.
    speedup_fp16, speedup_compiled: the same for a GPU's fp16, in the faster memory format, and for fp16-compile.
    merging: how many times as fast as the same engine without merging.
    shares: kind of operator (see `operations`) -> share of the time.
    """

    engine: str
    ratio: float
    tokens: float
    seconds: Spread
    seconds_by_repeat: list[float]
    speedup: Spread | None
    speedup_bf16: Spread | None
    speedup_openvino: Spread | None
    merging: Spread | None
    shares: dict[str, float] | None
    speedup_fp16: Spread | None = None
    speedup_compiled: Spread | None = None


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """The sizes of an engine. weight_bytes: as stored. peak_bytes: the most memory during a call, None if unknown.
    precision: "autocast" or "full", of all that is not in integers."""

    weight_bytes: int
    peak_bytes: int | None
    precision: str


@dataclass(frozen=True, kw_only=True)
class OperationCount:
    """Multiplications and additions of a UNet call at this merge ratio, by kind (see `operations`)."""

    ratio: float
    operations: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class FloorFigures:
    """A call's operations divided by the kernels' peak, in seconds, and int8's measured time divided by that."""

    ratio: float
    seconds: float
    times: float


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time that int8 could take (see `roofline`). peaks: operations a second, by kind."""

    peaks: dict[str, float]
    ratios: list[FloorFigures]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The UNet that was measured.

    config: the name of its yaml. latents, context: shapes of a call's inputs. bits: of the quantized engines, such as
    "W4A8". ranges: where the ranges of their quantizers come from, in words.
    """

    config: str
    random_weights: bool
    parameters: int
    latents: list[int]
    context: list[int]
    bits: str
    ranges: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole benchmark.

    machine: see `dsdiff.environment.machine`. steps: UNet calls that make a picture. left_out: the reasons, by the name
    of an engine or peer.
    """

    model: ModelFacts
    machine: Mapping[str, Any]
    repeats: int
    steps: int
    engines: dict[str, EngineFigures]
    settings: list[SettingFigures]
    operations: list[OperationCount]
    floor: Floor | None
    left_out: dict[str, str]
