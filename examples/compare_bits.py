"""The same prompt and noise at several bit widths, side by side: python examples/compare_bits.py outputs/bits.png"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where dsdiff is installed

from dsdiff import DrawOptions, Pipeline, QuantizationOptions, find_model
from dsdiff.images.grids import tile
from dsdiff.models.registry import EMBEDDED
from dsdiff.options import ModelOptions

path = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bits.png")
path.parent.mkdir(parents=True, exist_ok=True)

VARIANTS = {
    "float": None,
    "W8A8": QuantizationOptions(weight_bit=8, quant_act=True),
    "W4A32": QuantizationOptions(weight_bit=4),
    "W4A8": QuantizationOptions(weight_bit=4, quant_act=True),
}
spec = find_model(ModelOptions(config=EMBEDDED))
images = []
for name, quantization in VARIANTS.items():
    pipe = Pipeline(spec, quantization=quantization)
    (picture,) = pipe.draw("a red circle left of a blue star", seeds=[3], options=DrawOptions(steps=10))
    images.append(picture.image)
    error = np.square(np.asarray(images[0], float) - np.asarray(picture.image, float)).mean()
    print(f"{name}: {10 * np.log10(255**2 / error):.1f} dB" if error else f"{name}: the reference")
tile(images, len(images)).save(path)
print(path)
