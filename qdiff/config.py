"""Settings of quantization and of its calibration, as frozen dataclasses that validate themselves. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

SCALE_METHODS = ("max", "max_scale", "mse")
ACT_RANGES = ("static", "dynamic")
ROUNDINGS = ("adaround", "gptq", "nearest")
BITS = range(2, 17)


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{name} is {value!r}: it must be {rule}")


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        _refuse(name, value, f"a whole number of {low} or more" if high is None else f"a whole number in {low}..{high}")


def _check_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):
        _refuse(name, value, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(name, value, f"one of {', '.join(choices)}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "True or False")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Base of the settings: they are written to JSON as a plain dict."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make settings of what `to_dict` returns. Raises ValueError for unknown names and for values out of range."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} knows no {', '.join(unknown)}: the file is of a newer version?")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class QuantConfig(_Settings):
    """Settings of the quantization of a UNet.

    weight_bit: bits of all weights, in 2..16. Each output channel has its own range.
    act_bit: bits of the inputs of all layers, and of q, k, v of each attention, in 2..16.
    act_range: "static" gives each of these tensors one range, fitted to calibration data. "dynamic" takes the ranges of
        the inputs of layers while drawing: one for each token of a linear layer's input, one for each sample of a
        convolution's. Attention's q, k, v and softmax output keep one fitted range each.
    sm_abit: bits of the softmax output, in 2..16. Its zero point is 0.
    quant_act: quantize activations at all. Without it act_bit and sm_abit have no effect.
    split: quantize the two halves of each shortcut of the decoder separately (Q-Diffusion, section 3.3).
    scale_method: how the range of a weight channel is found. "max" takes its extremes, "max_scale" takes them times
        (bits + 2) / 8, and "mse" takes the one of 80 shrunk ranges with the least mean |error|^2.4.
    act_scale_method: the same for the fitted range of an activation.
    act_symmetric: make the codes of activations signed, with zero point 0.
    mixed_act: the bits, in 2..16, of inputs of layers that have others than act_bit, by the name of their quantizer,
        such as "model.input_blocks.0.0.act_quantizer".
    """

    weight_bit: int = 4
    act_bit: int = 8
    sm_abit: int = 16
    quant_act: bool = True
    split: bool = True
    scale_method: str = "max"
    act_scale_method: str = "max"
    act_symmetric: bool = False
    mixed_act: Mapping[str, int] = field(default_factory=dict)
    act_range: str = "static"

    def __post_init__(self):
        for name in ("weight_bit", "act_bit", "sm_abit"):
            _check_int(name, getattr(self, name), BITS[0], BITS[-1])
        if not isinstance(self.mixed_act, Mapping):
            _refuse("mixed_act", self.mixed_act, "a mapping of names to bits")
        for name, bits in self.mixed_act.items():
            _check_int(f"mixed_act[{name!r}]", bits, BITS[0], BITS[-1])
        for name in ("quant_act", "split", "act_symmetric"):
            _check_bool(name, getattr(self, name))
        for name in ("scale_method", "act_scale_method"):
            _check_choice(name, getattr(self, name), SCALE_METHODS)
        _check_choice("act_range", self.act_range, ACT_RANGES)


@dataclass(frozen=True, kw_only=True)
class MixConfig(_Settings):
    """Settings of the choice of inputs that get more bits than others.

    amount: how many, if 1 or more; a share in (0, 1) asks for the fewest that make this share of the error which the
        quantization of all inputs causes, see `qdiff.sensitivity`.
    bits: of these inputs, in 9..16.
    samples: how many of the calibration data are used to rank the inputs.
    probes: random vectors for each of them.
    seed: of the samples and vectors.
    """

    amount: float = 6
    bits: int = 12
    samples: int = 32
    probes: int = 4
    seed: int = 0

    def __post_init__(self):
        whole = self.amount >= 1 and self.amount == int(self.amount) if math.isfinite(self.amount) else False
        if not whole and not 0 < self.amount < 1:
            _refuse("mixed_act", self.amount, "a whole number of 1 or more, or a share in (0, 1)")
        _check_int("mixed_act_bit", self.bits, 9, 16)
        for name in ("samples", "probes"):
            _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class ReconConfig(_Settings):
    """Settings of the reconstruction of units.

    rounding: of weights. "adaround" learns it unit by unit; "gptq" makes good each column's error in the next columns,
        layer by layer; "nearest" rounds to nearest.
    iters_w, iters_a: steps for AdaRound, and for the step sizes of activations; 0 leaves them out.
    samples_w: the number of calibration samples from which GPTQ rounds, at most.
    damp: what GPTQ adds to the diagonal of its Hessian, as a share of the diagonal's mean, in (0, 1000]. The more there
        is, the less it trusts the samples, and the closer it comes to rounding to nearest.
    act_order: let GPTQ round the columns of the largest inputs first, in place of their own order.
    batch_size: samples per step, over all processes.
    lr_w: Adam's learning rate for AdaRound's alpha, in (0, 1].
    lr: Adam's learning rate for the step sizes, in (0, 1]; it falls to 0 along a half cosine.
    p: exponent of the loss |error|^p by which step sizes are learned, in [1, 10]. For the rounding of weights it is 2.
    weight: factor of the rounding regulariser in the loss, 0 or more.
    b_start, b_end, warmup: AdaRound's annealing (Nagel et al. 2020, eq. 24): the regulariser begins after the share
        `warmup` of the steps, and its exponent goes linearly from b_start to b_end.
    sym: feed units, or with GPTQ layers, the float model's inputs, in place of those of the model quantized so far.
    grad_checkpoint: recompute the unit's activations in the backward pass: less memory, more time.
    seed: of the choice of samples.
    """

    rounding: str = "adaround"
    iters_w: int = 20000
    iters_a: int = 5000
    samples_w: int = 128
    damp: float = 0.01
    act_order: bool = True
    batch_size: int = 8
    lr_w: float = 1e-3
    lr: float = 4e-4
    p: float = 2.4
    weight: float = 0.01
    b_start: float = 20.0
    b_end: float = 2.0
    warmup: float = 0.2
    sym: bool = False
    grad_checkpoint: bool = True
    seed: int = 0

    def __post_init__(self):
        _check_choice("rounding", self.rounding, ROUNDINGS)
        for name in ("iters_w", "iters_a", "seed"):
            _check_int(name, getattr(self, name), 0)
        for name in ("batch_size", "samples_w"):
            _check_int(name, getattr(self, name), 1)
        _check_number("damp", self.damp, 0, 1000, open_low=True)
        for name in ("lr_w", "lr"):
            _check_number(name, getattr(self, name), 0, 1, open_low=True)
        _check_number("p", self.p, 1, 10)
        _check_number("weight", self.weight, 0, 1e6)
        _check_number("b_end", self.b_end, 1, 100)
        _check_number("b_start", self.b_start, self.b_end, 100)
        _check_number("warmup", self.warmup, 0, 1)
        for name in ("act_order", "sym", "grad_checkpoint"):
            _check_bool(name, getattr(self, name))
