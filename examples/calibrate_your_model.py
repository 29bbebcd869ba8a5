"""Calibrate a model, and draw with it: python examples/calibrate_your_model.py outputs/examples/calibrated

The settings here are the quickest, not the best. For a model of your own give model=ModelOptions(config=..., ckpt=...),
and leave out quant_mode, cali_n, cali_st and draw: then rounding and step sizes are learned, in minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where dsdiff is installed

import dsdiff
from dsdiff.calibration import CalibrationOptions, calibrate
from dsdiff.models.registry import EMBEDDED

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/examples/calibrated")

draw = dsdiff.DrawOptions(sampler="dpm_solver", steps=4, height=64, width=64)
options = CalibrationOptions(
    model=dsdiff.ModelOptions(config=EMBEDDED),
    draw=draw,  # how the pictures are drawn whose UNet calls are the calibration data
    weight_bit=8,
    quant_act=True,
    quant_mode="linear",
    cali_n=2,
    cali_st=2,
    outdir=folder,
)
cali_ckpt = calibrate(options)
print(f"{cali_ckpt}: {cali_ckpt.stat().st_size / 1e6:.1f} MB")

pipe = dsdiff.load("embedded", cali_ckpt=cali_ckpt)
for picture in pipe.draw("a red circle on a blue background", options=draw):
    picture.image.save(folder / "picture.png")
    print(f"{folder / 'picture.png'}: {picture.settings.quantization}")
