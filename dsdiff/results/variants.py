"""The variants whose costs of quantization are measured, and the calibrations they need. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dsdiff.calibration.options import CalibrationOptions
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions

MODEL = ModelOptions(config=EMBEDDED)
DRAWING = DrawOptions(sampler="dpm_solver", steps=20, precision="full", vae="float32")
HALF = MergeOptions(ratio=0.5)


# Preset -> the rounding of its calibrations, and whether they learn the step sizes of activations (LSQ). The files that
# come with the model are of the fast one.
OWN = {"fast": ("gptq", False), "paper": ("adaround", True)}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration to 8-bit activations, as far as variants differ in it: see CalibrationOptions.

    rounding: of weights. lsq: whether the step sizes of activations are learned. None is the preset's of each, see
    `of`; with quant_mode linear neither has a meaning.
    """

    weight_bit: int
    quant_mode: str = "qdiff"
    split: bool = False
    rounding: str | None = None
    lsq: bool | None = None
    act_range: str | None = None
    mixed_act: float | None = None
    merge: MergeOptions | None = None

    def of(self, preset: str) -> Self:
        """Return the calibration with the preset's rounding and LSQ where it has none of its own."""
        if self.quant_mode == "linear":
            return self
        rounding, lsq = OWN[preset]
        return replace(self, rounding=self.rounding or rounding, lsq=lsq if self.lsq is None else self.lsq)

    @property
    def key(self) -> str:
        """A name for a folder, another one for each calibration."""
        parts = [f"w{self.weight_bit}a8", self.quant_mode, *(["split"] if self.split else [])]
        parts += [each for each in (self.rounding, "lsq" if self.lsq else None, self.act_range) if each is not None]
        parts += [] if self.mixed_act is None else [f"mixed_act{self.mixed_act:g}"]
        return "-".join(parts + ([f"ratio{self.merge.ratio:g}"] if self.merge else []))

    def options(self, preset: str, device: str, data_path: Path | None) -> CalibrationOptions:
        """Return all options. data_path: the calibration data of another variant, None to draw it."""
        own = self.of(preset)
        data: dict[str, Any] = {"cond": True, "draw": DRAWING} if data_path is None else {"data_path": data_path}
        return CalibrationOptions(
            weight_bit=own.weight_bit,
            quant_mode=own.quant_mode,
            split=own.split,
            rounding=own.rounding,
            iters_a=0 if own.lsq is False else None,
            act_range=own.act_range,
            mixed_act=own.mixed_act,
            merge=own.merge,
            **data,
            model=MODEL,
            preset=preset,
            device=device,
            quant_act=True,
            act_bit=8,
            sm_abit=16,
            no_grad_ckpt=bool(own.lsq) or own.rounding == "adaround",  # has no effect where nothing is learned
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table. calibration: None for full precision. quant_act: whether activations are quantized, too.
    merge: how tokens are merged while drawing, None for not at all."""

    name: str
    calibration: Calibration | None = None
    quant_act: bool = True
    merge: MergeOptions | None = None


# Weights are learned before activations, so that those of W4A8 are those of W4A32.
W8_LINEAR, W8 = Calibration(weight_bit=8, quant_mode="linear"), Calibration(weight_bit=8, split=True)
W4_LINEAR, W4 = Calibration(weight_bit=4, quant_mode="linear"), Calibration(weight_bit=4, split=True)
W4_MERGED = Calibration(weight_bit=4, split=True, merge=HALF)
SHIPPED = {
    Calibration(weight_bit=bits, split=True).of("fast"): path
    for bits, path in CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]].items()
}
TABLE = (
    Variant(name="full precision"),
    Variant(name="W8A8 linear", calibration=W8_LINEAR),
    Variant(name="W8A8 qdiff", calibration=W8),
    Variant(name="W4A32 linear", calibration=W4_LINEAR, quant_act=False),
    Variant(name="W4A32 qdiff", calibration=W4, quant_act=False),
    Variant(name="W4A8 linear", calibration=W4_LINEAR),
    Variant(name="W4A8 qdiff", calibration=W4),
    Variant(name="ratio 0.5", merge=HALF),
    Variant(name="W4A8 linear, ratio 0.5", calibration=W4_LINEAR, merge=HALF),
    Variant(name="W4A8 qdiff, ratio 0.5", calibration=W4, merge=HALF),
)
_ABLATION = (
    Variant(name="full precision"),
    Variant(name="W4A8 qdiff", calibration=W4),
    Variant(name="without split", calibration=Calibration(weight_bit=4)),
    Variant(name="by GPTQ", calibration=Calibration(weight_bit=4, split=True, rounding="gptq")),
    Variant(name="rounded to nearest", calibration=Calibration(weight_bit=4, split=True, rounding="nearest")),
    Variant(name="without LSQ", calibration=Calibration(weight_bit=4, split=True, lsq=False)),
    Variant(name="12 inputs of 12 bits", calibration=Calibration(weight_bit=4, split=True, mixed_act=12)),
    Variant(name="dynamic ranges", calibration=Calibration(weight_bit=4, split=True, act_range="dynamic")),
    Variant(
        name="dynamic, 12 inputs of 12 bits",
        calibration=Calibration(weight_bit=4, split=True, act_range="dynamic", mixed_act=12),
    ),
    Variant(name="calibrated plain, drawn merged", calibration=W4, merge=HALF),
    Variant(name="calibrated merged, drawn merged", calibration=W4_MERGED, merge=HALF),
    Variant(name="calibrated merged, drawn plain", calibration=W4_MERGED),
    # What learns by gradients comes last, since it takes longest.
    Variant(name="with LSQ", calibration=Calibration(weight_bit=4, split=True, lsq=True)),
    Variant(name="by AdaRound", calibration=Calibration(weight_bit=4, split=True, rounding="adaround")),
)


def ablation(preset: str) -> list[Variant]:
    """Return the variants that take a preset's calibration apart; none that is another one under a second name."""
    by_content: dict[Any, Variant] = {}
    for variant in _ABLATION:
        calibration = None if variant.calibration is None else variant.calibration.of(preset)
        by_content.setdefault((calibration, variant.merge), variant)
    return list(by_content.values())
