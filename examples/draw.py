"""Draw pictures from Python: python examples/draw.py outputs/examples"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where dsdiff is installed

import dsdiff

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/examples")
folder.mkdir(parents=True, exist_ok=True)

# 4-bit weights and 8-bit activations in integers, half of the tokens merged.
pipe = dsdiff.load("embedded", engine="int8", ratio=0.5)
print(pipe)

prompts = ["a large red circle on a white background", "a small blue star above a green heart"]
options = dsdiff.DrawOptions(sampler="dpm_solver", steps=10)
for picture in pipe.draw(prompts, seeds=[1, 2], options=options, batch_size=2):
    path = folder / f"{picture.seed}.png"
    picture.image.save(path)
    print(f"{path}: {picture.prompt} ({picture.settings.steps_taken} steps)")
