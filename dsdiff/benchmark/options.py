"""The options of a benchmark, as a frozen value that checks itself. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from dsdiff.models.registry import CONFIGS, EMBEDDED
from dsdiff.options import DrawOptions
from tomesd.options import MergeOptions

FLOAT_ENGINES = ("float32", "bf16")
DYNAMIC, DYNAMIC_MIXED = "int8-dynamic", "int8-dynamic-mixed"  # with dynamic ranges of activations
COMPILED = "fp16-compile"
GPU_ENGINES = ("fp16", "fp16-channels-last", COMPILED)  # float UNets of a GPU, of which single calls are measured
QUANTIZED_ENGINES = ("simulate", "int8", "int8-float32", DYNAMIC, DYNAMIC_MIXED)
ENGINES = (*FLOAT_ENGINES, *GPU_ENGINES, *QUANTIZED_ENGINES)
DEFAULT_ENGINES = ("float32", "bf16", "simulate", "int8")
PICTURE_ENGINES = ("float32", "bf16", "int8")  # the default for whole pictures

TOME = "-tome"  # ends the names of peers that merge tokens
DIFFUSERS = ("diffusers-float32", "diffusers-bf16")
OPENVINO_INT8 = ("openvino-int8", "openvino-int8-float32")
MERGING = ("openvino-bf16-tome", "openvino-int8-tome")  # these merge tokens as we do, MERGED_RATIO of them
OPENVINO = ("openvino-float32", "openvino-bf16", *OPENVINO_INT8, *MERGING)
SDCPP = ("sdcpp-q4", "sdcpp-q8")  # stable-diffusion.cpp; whole pictures only
PEERS = (*DIFFUSERS, *OPENVINO, *SDCPP)
CALL_PEERS = (*DIFFUSERS, *OPENVINO)  # those of which UNet calls can be measured
PICTURE_PEERS = (*DIFFUSERS, "openvino-int8", "openvino-int8-tome", *SDCPP)  # the default for whole pictures
MERGED_RATIO = 0.5
TINY = "tiny"  # ends the ways to draw with a tiny decoder, which diffusers and stable-diffusion.cpp are not asked for

WEIGHT_BITS = (4, 8)
RATIOS, PICTURE_RATIOS = (0.0, 0.3, 0.5), (0.0, 0.5)  # defaults, of UNet calls and of whole pictures
# The names of `qdiff.engine.cpu.ISAS`, which imports torch.
CAPS = ("AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX")

# What has no effect in a mode of the command.
OF_PICTURES = ("draws", "steps_measured", "full")
OF_CALLS = ("config", "memory", "seconds", "batch", "latents")
FLAGS = {"engines": "engine", "ratios": "ratio"}  # where a flag's name is not that of its option
IDLE = {
    "startup": ("pictures", "isa", "engines", "peers", "random_weights", "ratios", "weight_bit", *OF_CALLS),
    "kernels": (
        *("model", "config", "random_weights", "engines", "peers", "ratios", "weight_bit", "memory"),
        *("batch", "latents", "pictures", "isa", "startup", "device"),
    ),
    "pictures": OF_CALLS,
}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How to draw a picture.

    sampler: a name. steps: their number, 1 or more. scale: of guidance; None is the model's, and none with samplers of
    few steps. tiny: let a tiny decoder make the picture.
    """

    sampler: str
    steps: int
    scale: float | None = None
    tiny: bool = False

    def __post_init__(self) -> None:
        DrawOptions(sampler=self.sampler, steps=self.steps, scale=self.scale)  # which tells what is out of range

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read SAMPLER:STEPS or SAMPLER:STEPS:SCALE, and :tiny behind them. Raises ValueError for anything else."""
        sampler, *numbers = text.removesuffix(f":{TINY}").split(":")
        if len(numbers) not in (1, 2):
            raise ValueError(f"{text!r} is no SAMPLER:STEPS[:SCALE][:tiny], such as dpm_solver:20")
        try:
            steps, scale = int(numbers[0]), float(numbers[1]) if numbers[1:] else None
        except ValueError:
            raise ValueError(f"{text!r}: STEPS must be a whole number and SCALE a number") from None
        try:
            return cls(sampler=sampler, steps=steps, scale=scale, tiny=text.endswith(f":{TINY}"))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None

    def __str__(self) -> str:
        scale = "" if self.scale is None else " without guidance" if self.scale == 1 else f" at scale {self.scale:g}"
        return f"{self.steps} {self.sampler}{scale}{', tiny decoder' if self.tiny else ''}"


DRAWS = (
    Draw(sampler="plms", steps=50),
    Draw(sampler="dpm_solver", steps=20),
    Draw(sampler="dpm_solver", steps=4, scale=1.0),
    Draw(sampler="lcm", steps=4, tiny=True),
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Which model to measure, and how.

    model: a key of CONFIGS. None is the embedded model, unless `config` is given.
    config: the yaml of any other model.
    random_weights: build the model without a checkpoint.
    engines: some of ENGINES. None takes those of DEFAULT_ENGINES (PICTURE_ENGINES) that run here.
    peers: some of PEERS.
    ratios: the shares of tokens to merge; 0 merges none. None takes RATIOS (PICTURE_RATIOS).
    weight_bit: the bits of weights in quantized engines, one of WEIGHT_BITS.
    memory: measure peak memory as well.
    repeats: the number of times that each setting is measured.
    seconds: the time of one measurement, which is the mean of the calls that fit into it, at least one.
    batch: the samples of a UNet call; guidance takes 2 for a picture.
    latents: height and width of a UNet call's latents. None takes the model's.
    pictures: measure whole pictures, instead of UNet calls.
    draws: how the pictures are drawn.
    steps_measured: the most steps that are taken of a picture; the time of the others is extrapolated.
    full: take all steps.
    isa: measure under these caps of the instruction set, some of CAPS; () takes those that this CPU has. None measures
        without a cap.
    device: a name for `choose_device`: auto, cpu, cuda or cuda:N.
    threads: the number of CPU threads. None takes torch's choice.
    outdir: the folder for all files that are written.
    startup: measure how long commands take to start, instead of UNet calls.
    kernels: measure our C kernels one by one, instead of UNet calls.
    Raises ValueError for a value out of range, and for options that contradict each other.
    """

    model: str | None = None
    config: Path | None = None
    random_weights: bool = False
    engines: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    ratios: tuple[float, ...] | None = None
    weight_bit: int = 4
    memory: bool = False
    repeats: int = 5
    seconds: float = 0.5
    batch: int = 2
    latents: tuple[int, int] | None = None
    pictures: bool = False
    draws: tuple[Draw, ...] = DRAWS
    steps_measured: int = 4
    full: bool = False
    isa: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int | None = None
    outdir: Path = Path("outputs/benchmark")
    startup: bool = False
    kernels: bool = False

    def __post_init__(self) -> None:
        _check_choices("model", [] if self.model is None else [self.model], list(CONFIGS))
        _check_choices("engine", self.engines or (), ENGINES)
        _check_choices("peer", self.peers, PEERS)
        _check_choices("isa", self.isa or (), CAPS)
        if self.weight_bit not in WEIGHT_BITS:
            raise ValueError(f"weight_bit is {self.weight_bit}: it must be one of {', '.join(map(str, WEIGHT_BITS))}")
        for ratio in self.ratios or ():
            if ratio:  # MergeOptions tells what is out of range
                MergeOptions(ratio=ratio)
        for name in ("repeats", "threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be a whole number of 1 or more")
        if self.steps_measured < 2:
            raise ValueError(f"steps_measured is {self.steps_measured}: it must be 2 or more, the first step is longer")
        if self.seconds < 0:
            raise ValueError(f"seconds is {self.seconds}: it must be 0 or more")
        self._check_weights()
        self._check_idle()

    @property
    def config_path(self) -> Path:
        """The yaml of the model."""
        return self.config or (EMBEDDED if self.model is None else CONFIGS[self.model])

    @property
    def chosen_ratios(self) -> tuple[float, ...]:
        """The ratios, or their default."""
        return self.ratios or (PICTURE_RATIOS if self.pictures else RATIOS)

    def _check_weights(self) -> None:
        if self.config is not None and self.model is not None:
            raise ValueError(f"config {str(self.config)!r} and model {self.model!r} name two models: leave out one")
        if self.startup or self.kernels:  # which need no file, or make their own
            return
        if self.config is not None and not self.random_weights:
            raise ValueError("a config of your own comes without a checkpoint: add --random_weights")
        if self.random_weights and self.config is None and self.config_path == EMBEDDED:
            raise ValueError("--random_weights contradicts the embedded model, which has weights: leave it out")

    def _check_idle(self) -> None:
        """Raise ValueError for options that have no effect with the others."""
        mode = next((name for name in ("kernels", "startup", "pictures") if getattr(self, name)), "calls")
        reason = {
            "kernels": "on single kernels",
            "startup": "on the time to start",
            "pictures": "on whole pictures",
            "calls": "without --pictures",
        }
        self._refuse([*IDLE.get(mode, ()), *(() if mode == "pictures" else OF_PICTURES)], reason[mode])
        of_calls = [name for name in self.engines or () if name in GPU_ENGINES]
        if self.pictures and of_calls:
            raise ValueError(f"engine {of_calls[0]} has no pictures: leave it out, or leave out --pictures")
        if self.full:
            self._refuse(["steps_measured"], "with --full, which takes all steps")

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        plain = {each.name: each.default for each in fields(self)}
        idle = [name for name in names if getattr(self, name) != plain[name]]
        if idle:
            flags = ", ".join(f"--{FLAGS.get(name, name)}" for name in idle)
            raise ValueError(f"{flags} has no effect {reason}: leave it out")


def _check_choices(name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown: it must be one of {', '.join(choices)}")
