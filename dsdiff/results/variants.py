"""The variants whose costs of quantization are measured, and the calibrations they need. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdiff.calibration.options import CalibrationOptions
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions

MODEL = ModelOptions(config=EMBEDDED)
DRAWING = DrawOptions(sampler="dpm_solver", steps=20, precision="full", vae="float32")
HALF = MergeOptions(ratio=0.5)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration to 8-bit activations, as far as variants differ in it: see CalibrationOptions.

    rounding: None is the preset's. lsq: learn the step sizes of activations, as the preset does. Without it the fast
    preset does not, as the files that come with the model; the paper preset, Q-Diffusion's, always does.
    """

    weight_bit: int
    quant_mode: str = "qdiff"
    split: bool = False
    rounding: str | None = None
    lsq: bool = False
    act_range: str | None = None
    mixed_act: float | None = None
    merge: MergeOptions | None = None

    @property
    def key(self) -> str:
        """A name for a folder, another one for each calibration."""
        parts = [f"w{self.weight_bit}a8", self.quant_mode, *(["split"] if self.split else [])]
        parts += [each for each in (self.rounding, "lsq" if self.lsq else None, self.act_range) if each is not None]
        parts += [] if self.mixed_act is None else [f"mixed_act{self.mixed_act:g}"]
        return "-".join(parts + ([f"ratio{self.merge.ratio:g}"] if self.merge else []))

    def options(self, preset: str, device: str, data_path: Path | None) -> CalibrationOptions:
        """Return all options. data_path: the calibration data of another variant, None to draw it."""
        steps_learned = self.quant_mode == "qdiff" and (self.lsq or preset == "paper")
        data: dict[str, Any] = {"cond": True, "draw": DRAWING} if data_path is None else {"data_path": data_path}
        return CalibrationOptions(
            weight_bit=self.weight_bit,
            quant_mode=self.quant_mode,
            split=self.split,
            rounding=self.rounding if self.quant_mode == "qdiff" else None,
            iters_a=None if steps_learned or self.quant_mode == "linear" else 0,
            act_range=self.act_range,
            mixed_act=self.mixed_act,
            merge=self.merge,
            **data,
            model=MODEL,
            preset=preset,
            device=device,
            quant_act=True,
            act_bit=8,
            sm_abit=16,
            no_grad_ckpt=steps_learned or self.rounding == "adaround",  # has no effect where nothing is learned
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
    Calibration(weight_bit=bits, split=True): path for bits, path in CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]].items()
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
ABLATION = (
    Variant(name="full precision"),
    Variant(name="W4A8 qdiff", calibration=W4),
    Variant(name="without split", calibration=Calibration(weight_bit=4)),
    Variant(name="AdaRound", calibration=Calibration(weight_bit=4, split=True, rounding="adaround")),
    Variant(name="rounded to nearest", calibration=Calibration(weight_bit=4, split=True, rounding="nearest")),
    Variant(name="with LSQ", calibration=Calibration(weight_bit=4, split=True, lsq=True)),
    Variant(
        name="AdaRound, with LSQ", calibration=Calibration(weight_bit=4, split=True, rounding="adaround", lsq=True)
    ),
    Variant(name="12 inputs of 12 bits", calibration=Calibration(weight_bit=4, split=True, mixed_act=12)),
    Variant(name="dynamic ranges", calibration=Calibration(weight_bit=4, split=True, act_range="dynamic")),
    Variant(
        name="dynamic, 12 inputs of 12 bits",
        calibration=Calibration(weight_bit=4, split=True, act_range="dynamic", mixed_act=12),
    ),
    Variant(name="calibrated plain, drawn merged", calibration=W4, merge=HALF),
    Variant(name="calibrated merged, drawn merged", calibration=W4_MERGED, merge=HALF),
    Variant(name="calibrated merged, drawn plain", calibration=W4_MERGED),
)
