"""The options of a benchmark, as a frozen value that checks itself. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dsdiff.models.registry import CONFIGS, EMBEDDED
from tomesd.options import MergeOptions

FLOAT_ENGINES = ("float32", "bf16")
QUANTIZED_ENGINES = ("simulate", "int8", "int8-float32")
ENGINES = (*FLOAT_ENGINES, *QUANTIZED_ENGINES)
DEFAULT_ENGINES = ("float32", "bf16", "simulate", "int8")

DIFFUSERS = ("diffusers-float32", "diffusers-bf16")
OPENVINO = ("openvino-float32", "openvino-bf16", "openvino-int8", "openvino-int8-float32")
PEERS = (*DIFFUSERS, *OPENVINO)

WEIGHT_BITS = (4, 8)
# Options that shape UNet calls alone, and have no effect where the time to start is measured.
IDLE_AT_STARTUP = ("config", "engines", "peers", "random_weights", "memory", "ratios", "weight_bit", "seconds")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Which UNet to measure, and how.

    model: a key of CONFIGS. None is the embedded model, unless `config` is given.
    config: the yaml of any other model.
    random_weights: build the UNet without a checkpoint.
    engines: some of ENGINES. None takes those of DEFAULT_ENGINES that run here.
    peers: some of PEERS.
    ratios: the shares of tokens to merge; 0 merges none.
    weight_bit: the bits of weights in quantized engines, one of WEIGHT_BITS.
    memory: measure peak memory as well.
    repeats: the number of times that each setting is measured.
    seconds: the time of one measurement, which is the mean of the calls that fit into it, at least one.
    device: a name for `choose_device`: auto, cpu, cuda or cuda:N.
    threads: the number of CPU threads. None takes torch's choice.
    outdir: the folder for all files that are written.
    startup: measure how long commands take to start, instead of UNet calls.
    Raises ValueError for a value out of range, and for options that contradict each other.
    """

    model: str | None = None
    config: Path | None = None
    random_weights: bool = False
    engines: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    ratios: tuple[float, ...] = (0.0, 0.3, 0.5)
    weight_bit: int = 4
    memory: bool = False
    repeats: int = 5
    seconds: float = 0.5
    device: str = "auto"
    threads: int | None = None
    outdir: Path = Path("outputs/benchmark")
    startup: bool = False

    def __post_init__(self) -> None:
        _check_choices("model", [] if self.model is None else [self.model], list(CONFIGS))
        _check_choices("engine", self.engines or (), ENGINES)
        _check_choices("peer", self.peers, PEERS)
        if self.weight_bit not in WEIGHT_BITS:
            raise ValueError(f"weight_bit is {self.weight_bit}: it must be one of {', '.join(map(str, WEIGHT_BITS))}")
        for ratio in self.ratios:
            if ratio:  # MergeOptions tells what is out of range
                MergeOptions(ratio=ratio)
        for name in ("repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be a whole number of 1 or more")
        if self.seconds < 0:
            raise ValueError(f"seconds is {self.seconds}: it must be 0 or more")
        self._check_weights()
        self._check_startup()

    @property
    def config_path(self) -> Path:
        """The yaml of the model."""
        return self.config or (EMBEDDED if self.model is None else CONFIGS[self.model])

    def _check_weights(self) -> None:
        if self.config is not None and self.model is not None:
            raise ValueError(f"config {str(self.config)!r} and model {self.model!r} name two models: leave out one")
        if self.startup:  # which makes its own file of Stable Diffusion v1
            return
        if self.config is not None and not self.random_weights:
            raise ValueError("a config of your own comes without a checkpoint: add --random_weights")
        if self.random_weights and self.config is None and self.config_path == EMBEDDED:
            raise ValueError("--random_weights contradicts the embedded model, which has weights: leave it out")

    def _check_startup(self) -> None:
        if not self.startup:
            return
        plain = {each.name: each.default for each in fields(self)}
        idle = [name for name in IDLE_AT_STARTUP if getattr(self, name) != plain[name]]
        if idle:
            raise ValueError(f"{', '.join(idle)} has no effect on the time to start: leave it out")


def _check_choices(name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown: it must be one of {', '.join(choices)}")
