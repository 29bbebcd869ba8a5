"""Pictures by stable-diffusion.cpp, through its Python bindings, from our weights. Runs in a `child` only.

The library tells by log messages where a phase ends, and calls back after each step. Its samplers are the nearest that
it has: iPNDM for PLMS, which starts with one call of the UNet in place of two, and DPM++ 2M for DPM-Solver.
"""

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

from dsdiff.benchmark.pictures.request import PROMPT, SEED, Clock, PictureRequest

TYPES = {"sdcpp-q4": "q4_0", "sdcpp-q8": "q8_0"}  # of the weights; those of convolutions stay in float16
SAMPLERS = {
    "plms": "ipndm",
    "ddim": "ddim_trailing",
    "dpm_solver": "dpm++2m",
    "euler": "euler",
    "euler_a": "euler_a",
    "lcm": "lcm",
    "tcd": "tcd",
}
ENDS = {"get_learned_condition completed": "text", "decode_first_stage completed": "decoding"}  # message -> phase


def draw(request: PictureRequest, clock: Clock) -> str:
    """Draw the picture of a request; return facts in words."""
    if request.sampler not in SAMPLERS:
        raise ValueError(f"it has no sampler like {request.sampler}: choose one of {', '.join(SAMPLERS)}")
    library: Any = importlib.import_module("stable_diffusion_cpp")
    started = False  # the progress of loading is told by the same callback

    def told(level: int, text: bytes, data: Any) -> None:
        nonlocal started
        for message, phase in ENDS.items():
            if message.encode() in text:
                clock.lap(phase)
                started = phase == "text"

    def stepped(step: int, steps: int, seconds: float) -> None:
        if started and step > 0:
            clock.step()

    callback = library.sd_log_callback(told)
    library.sd_set_log_callback(callback, ctypes.c_void_p(0))
    model = library.StableDiffusion(
        model_path=request.files["model"],
        n_threads=request.threads or os.cpu_count() or 1,
        vae_decode_only=True,
        diffusion_flash_attn=True,
    )
    clock.ready()
    (picture,) = model.generate_image(
        PROMPT,
        cfg_scale=request.scale,
        sample_method=SAMPLERS[request.sampler],
        sample_steps=request.steps,
        seed=SEED,
        progress_callback=stepped,
    )
    picture.save(request.png)
    clock.lap("png")
    return f"weights in {TYPES[request.name]} and float16, flash attention"


def make_file(name: str, ckpt: Path, file: Path) -> None:
    """Convert a checkpoint to the library's own format, with the type of weights of the peer `name`.

    Raises ValueError if the library refuses.
    """
    library: Any = importlib.import_module("stable_diffusion_cpp")
    part = file.with_name(f"part-{file.name}")
    kind = getattr(library.GGMLType, f"SD_TYPE_{TYPES[name].upper()}")
    done = library.convert(str(ckpt).encode(), b"", str(part).encode(), kind, b"", False)
    if not done or not part.is_file():
        raise ValueError(f"stable-diffusion.cpp does not convert {str(ckpt)!r}")
    part.replace(file)
