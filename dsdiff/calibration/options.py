"""The options of a calibration, as frozen values that check themselves. Nothing here imports torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsdiff.checks import check_choice, check_whole
from dsdiff.options import QUANT_MODES, DrawOptions, LoraOptions, MergeOptions, ModelOptions
from qdiff.config import ACT_RANGES, ROUNDINGS, MixConfig, QuantConfig, ReconConfig

FORMATS = ("dsdiff", "qdiff")
GIB = 2**30
DEFAULT_CACHE_GB = 2.0

# Options that shape one part alone: AdaRound, GPTQ, the step sizes of activations, all learning by gradients.
ADAROUND = ("lr_w", "weight", "b_start", "b_end", "warmup")
GPTQ = ("samples_w", "damp", "no_act_order")
STEP_SIZES = ("lr", "p")
LEARNING = ("no_grad_ckpt", "cache_gb")
# All of them, which the baseline knows nothing of.
QDIFF = ("rounding", "iters_w", "iters_a", *ADAROUND, *GPTQ, *STEP_SIZES, "sym", *LEARNING)
# Options of ReconConfig that have its defaults, where no preset says otherwise.
OF_RECON_CONFIG = ("samples_w", "damp", "p", "weight", "b_start", "b_end", "warmup")
# How the command calls the fields of DrawOptions.
DRAW_FLAGS = {"steps": "ddim_steps", "eta": "ddim_eta", "height": "H", "width": "W"}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is collected and learned: the options that a preset sets."""

    cali_st: int
    cali_n: int
    rounding: str
    iters_w: int
    iters_a: int
    batch_size: int
    lr_w: float
    lr: float


# fast: minutes on a CPU for the embedded model. paper: Q-Diffusion's numbers (Li et al. 2023).
PRESETS: Mapping[str, Effort] = {
    "fast": Effort(cali_st=10, cali_n=12, rounding="gptq", iters_w=300, iters_a=100, batch_size=16, lr_w=3e-2, lr=2e-2),
    "paper": Effort(
        cali_st=25, cali_n=128, rounding="adaround", iters_w=20000, iters_a=5000, batch_size=8, lr_w=1e-3, lr=4e-4
    ),
}


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How to calibrate a model. None takes the preset's value, or else the default of `qdiff.config`.

    The model and what is quantized:
        model: the float model.
        lora: LoRAs that are merged into it before all else.
        merge: the token merging to calibrate with; None merges none.
        weight_bit, quant_act, act_bit, sm_abit, split: what is quantized, and to how many bits; see QuantConfig.
        act_range: whether ranges of the inputs of layers are fitted ("static") or taken while drawing ("dynamic"), see
            QuantConfig. None is static.
        mixed_act: the amount of most sensitive inputs that get more bits, see MixConfig; None for none.
        mixed_act_bit: their bits, in 9..16. None is 12.
        quant_mode: "qdiff" learns roundings and step sizes. "linear", the baseline, rounds to nearest between minimum
            and maximum.
        running_stat: take the ranges of activations from running averages of minimum and maximum.
    The calibration data:
        draw: how the pictures of the data are drawn, without merged tokens.
        prompts: a text file with one prompt per line. None takes the one that comes with the model.
        cali_st, cali_n: the number of timesteps, spread over the trajectory, and of pictures at each.
        cond: keep both branches of guidance, with the prompt and without.
        data_path: ready data, of an earlier calibration or in Q-Diffusion's layout, instead of new pictures.
        num_samples: the number of samples to take at random. None takes all.
    Learning:
        preset: a key of PRESETS.
        batch_size: the number of samples per step, over all processes.
        rounding: of weights, "adaround", "gptq" or "nearest", as in ReconConfig.
        samples_w, damp, no_act_order: GPTQ's settings, as in ReconConfig.
        iters_w, lr_w, weight, b_start, b_end, warmup: AdaRound's settings, as in ReconConfig.
        iters_a, lr, p: LSQ's settings, as in ReconConfig.
        sym: feed units, or with GPTQ layers, the float model's inputs, as in ReconConfig.
        no_grad_ckpt: use no gradient checkpointing: faster, with more memory.
        cache_gb: GiB of activations to keep in memory; the rest goes to disk. None is 2.
    The run:
        seed: the seed of picture 0's noise and of all random choices, in [0, 2**31).
        device: a name for `choose_device`. Under torchrun each process gives its own.
        outdir: the folder for all files.
        resume: go on with the interrupted calibration in `outdir`.
        format: the file's format, "dsdiff", or "qdiff" for Q-Diffusion's .pth.
    Raises ValueError for a value out of range, and for an option that would have no effect.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    lora: tuple[LoraOptions, ...] = ()
    draw: DrawOptions = field(default_factory=DrawOptions)
    merge: MergeOptions | None = None

    weight_bit: int = 4
    quant_act: bool = False
    act_bit: int | None = None
    sm_abit: int | None = None
    split: bool = False
    act_range: str | None = None
    mixed_act: float | None = None
    mixed_act_bit: int | None = None
    quant_mode: str = "qdiff"
    running_stat: bool = False

    prompts: Path | None = None
    cali_st: int | None = None
    cali_n: int | None = None
    cond: bool = False
    data_path: Path | None = None
    num_samples: int | None = None

    preset: str = "fast"
    batch_size: int | None = None
    rounding: str | None = None
    samples_w: int | None = None
    damp: float | None = None
    no_act_order: bool = False
    iters_w: int | None = None
    iters_a: int | None = None
    lr_w: float | None = None
    lr: float | None = None
    p: float | None = None
    weight: float | None = None
    b_start: float | None = None
    b_end: float | None = None
    warmup: float | None = None
    sym: bool = False
    no_grad_ckpt: bool = False
    cache_gb: float | None = None

    seed: int = 42
    device: str = "auto"
    outdir: Path = Path("outputs/calibration")
    resume: bool = False
    format: str = "dsdiff"

    def __post_init__(self) -> None:
        for name, choices in (("quant_mode", QUANT_MODES), ("preset", tuple(PRESETS)), ("format", FORMATS)):
            check_choice(name, getattr(self, name), choices)
        for name, choices in (("rounding", ROUNDINGS), ("act_range", ACT_RANGES)):
            check_choice(name, getattr(self, name), choices, optional=True)
        for name in ("cali_st", "cali_n", "num_samples", "batch_size"):
            check_whole(name, getattr(self, name), 1, optional=True)
        check_whole("seed", self.seed, 0, 2**31 - 1)
        if self.cache_gb is not None and not (math.isfinite(self.cache_gb) and self.cache_gb >= 0):
            raise ValueError(f"cache_gb is {self.cache_gb!r}: it must be a finite number of 0 or more")
        if self.merge is not None and self.merge.follows_others:
            raise ValueError(
                "calibration goes through blocks one by one, at all steps: it cannot merge by merge_schedule, "
                "merge_every or merge_share; leave them out"
            )
        if self.draw.merge is not None:
            raise ValueError("calibration data is drawn without merging: leave draw.merge out, and give merge")
        self._refuse_without_effect()
        self.quant_config()  # which checks the bits
        self.mix_config()
        self.recon_config()  # which checks the rest

    # --- what the options mean ----------------------------------------------------------------------------

    @property
    def effort(self) -> Effort:
        """The preset's values, replaced by those that are given. AdaRound of no steps is rounding to nearest."""
        given = replace(PRESETS[self.preset], **self._given([each.name for each in fields(Effort)]))
        return replace(given, rounding="nearest") if given.rounding == "adaround" and not given.iters_w else given

    def quant_config(self) -> QuantConfig:
        """Return what is quantized. Learning starts from ranges of least error; the baseline takes the extremes."""
        method = "max" if self.quant_mode == "linear" else "mse"
        return QuantConfig(
            weight_bit=self.weight_bit,
            quant_act=self.quant_act,
            split=self.split,
            scale_method=method,
            act_scale_method=method,
            **self._given(("act_bit", "sm_abit", "act_range")),
        )

    def mix_config(self) -> MixConfig | None:
        """Return which inputs get more bits; None if all have the same."""
        if self.mixed_act is None:
            return None
        bits = {} if self.mixed_act_bit is None else {"bits": self.mixed_act_bit}
        return MixConfig(amount=self.mixed_act, seed=self.seed, **bits)

    def recon_config(self) -> ReconConfig | None:
        """Return how units are learned; None for the baseline, which learns nothing."""
        if self.quant_mode == "linear":
            return None
        effort = self.effort
        return ReconConfig(
            rounding=effort.rounding,
            iters_w=effort.iters_w,
            iters_a=effort.iters_a,
            batch_size=effort.batch_size,
            lr_w=effort.lr_w,
            lr=effort.lr,
            act_order=not self.no_act_order,
            sym=self.sym,
            grad_checkpoint=not self.no_grad_ckpt,
            seed=self.seed,
            **self._given(OF_RECON_CONFIG),
        )

    @property
    def cache_bytes(self) -> int:
        """How many bytes of activations are kept in memory."""
        return int((DEFAULT_CACHE_GB if self.cache_gb is None else self.cache_gb) * GIB)

    @property
    def target(self) -> Path:
        """The file to write."""
        return self.outdir / ("cali.pth" if self.format == "qdiff" else "cali.safetensors")

    # --- options without effect ---------------------------------------------------------------------------

    def _refuse_without_effect(self) -> None:
        if self.lora and self.format == "qdiff":
            raise ValueError("Q-Diffusion's format has no place for the LoRA's name: leave out --lora or --format")
        if self.quant_mode == "linear":
            self._refuse(QDIFF, "--quant_mode linear learns nothing")
        if self.data_path is not None:
            self._refuse_drawing(self.data_path)
        self._refuse_of_other_roundings()
        if self.iters_a == 0:
            self._refuse(STEP_SIZES, "with --iters_a 0 no step size is learned")
        if self.mixed_act is None:
            self._refuse(("mixed_act_bit",), "without --mixed_act all inputs have the same bits")
        elif self.format == "qdiff":
            raise ValueError(
                "Q-Diffusion's format has one width for all activations: leave out --mixed_act or --format"
            )
        if self.act_range == "dynamic" and self.format == "qdiff":
            raise ValueError(
                "Q-Diffusion's format has a fixed range for each activation: leave out --act_range or --format"
            )
        if self.format == "qdiff" and self.quant_mode == "qdiff" and self.effort.rounding == "gptq":
            raise ValueError(
                "Q-Diffusion's format holds weights rounded up or down, and GPTQ goes farther: give --rounding "
                "adaround or nearest, or leave out --format"
            )
        if not self.quant_act:
            idle = ("act_bit", "sm_abit", "act_range", "mixed_act", "iters_a", *STEP_SIZES, "running_stat")
            self._refuse(idle, "without --quant_act activations stay float")

    def _refuse_of_other_roundings(self) -> None:
        """Raise ValueError for options of other roundings than the one asked for, and of learning if there is none."""
        rounding = self.effort.rounding
        if rounding == "nearest":
            flag = "--iters_w 0" if self.iters_w == 0 and self.rounding != "nearest" else "--rounding nearest"
            own = () if flag == "--iters_w 0" else ("iters_w",)
            self._refuse((*own, *ADAROUND, *GPTQ), f"with {flag} weights are rounded to nearest")
        elif rounding == "gptq":
            self._refuse(("iters_w", *ADAROUND), "GPTQ learns nothing, as --rounding adaround does")
        else:
            self._refuse(GPTQ, f"with --rounding {rounding} there is no GPTQ")
        if rounding != "adaround" and not (self.quant_act and self.effort.iters_a):
            idle = LEARNING if rounding == "gptq" else (*LEARNING, "sym")
            self._refuse(idle, f"with --rounding {rounding} and no steps for activations nothing is learned")

    def _refuse_drawing(self, data_path: Path) -> None:
        """Raise ValueError for options of the drawing.

        cali_st and cali_n choose a part of data in Q-Diffusion's layout; data of ours is taken as it is.
        """
        why = "with --data_path nothing is drawn"
        ours = data_path.suffix == ".safetensors"
        self._refuse(("prompts", "cond", *(("cali_st", "cali_n") if ours else ())), why)
        if self.draw.sampler != "ddim":
            raise ValueError(f"{why}, so a sampler has no effect: leave it out")
        plain = DrawOptions()
        names = [
            each.name for each in fields(DrawOptions) if getattr(self.draw, each.name) != getattr(plain, each.name)
        ]
        flags = [DRAW_FLAGS.get(name, name) for name in names]
        _refuse_flags([*flags, *(["tokenizer"] if self.model.tokenizer is not None else [])], why)

    def _refuse(self, names: Sequence[str], why: str) -> None:
        _refuse_flags([*self._given(names)], why)

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return those of the options `names` that are given, with their values. Defaults are None or False."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def _refuse_flags(flags: Sequence[str], why: str) -> None:
    if flags:
        raise ValueError(f"{why}, so {', '.join(f'--{flag}' for flag in flags)} has no effect: leave it out")
