"""Build a model and draw until its first step begins: `python -X importtime -m dsdiff.benchmark.first_step REQUEST`.

`startup` runs it in fresh processes. It writes marks to stderr, between the lines in which Python tells the time of
each import. A mark is a line "mark: NAME SECONDS CPU", with the time of day and the CPU time of this process. The
names, in order: "started", "imported", "weights read" and "model ready" (which `dsdiff.models.held` logs), and
"first step".
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from ldm.fileio import hash_ahead

MARK = "mark:"
LOADING = ("weights read", "model ready")  # messages of dsdiff.models.held, at the level DEBUG


class FirstStepReached(Exception):  # noqa: N818 (no error)
    """Raised in place of the first step of the UNet."""


class LoadingMarks(logging.Handler):
    """Makes a mark of each message that tells how far a model is loaded."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() in LOADING:
            mark(record.getMessage())


def mark(name: str) -> None:
    """Write a mark."""
    print(MARK, name, f"{time.time():.6f}", f"{time.process_time():.6f}", file=sys.stderr, flush=True)


def draw_until_first_step(*, ckpt: str | None, config: str | None, ptq: bool, device: str, threads: int | None) -> None:
    """Build a pipeline from files, quantized where `ptq`, and draw until its UNet is called."""
    hash_ahead([Path(ckpt)] if ckpt else [])  # as scripts/txt2img.py does
    import torch

    from dsdiff.models.spec import find_model
    from dsdiff.options import DrawOptions, ModelOptions, QuantizationOptions
    from dsdiff.pipeline import Pipeline

    if threads is not None:
        torch.set_num_threads(threads)
    mark("imported")
    logger = logging.getLogger("dsdiff.models.held")
    logger.addHandler(LoadingMarks())
    logger.setLevel(logging.DEBUG)
    files: dict[str, Any] = {name: Path(path) for name, path in (("ckpt", ckpt), ("config", config)) if path}
    spec = find_model(ModelOptions(**files))
    pipeline = Pipeline(spec, device=device, quantization=QuantizationOptions() if ptq else None)
    settings = pipeline.resolve(DrawOptions())
    unet = pipeline.prepare(settings).model.diffusion_model
    unet.register_forward_pre_hook(reach_first_step)
    pipeline.sample(["a red circle on a blue background"], [42], settings)


def reach_first_step(unet: Any, args: Any) -> None:
    """Forward hook: end before the UNet is called."""
    raise FirstStepReached


def main() -> None:
    mark("started")
    try:
        draw_until_first_step(**json.loads(sys.argv[1]))
    except FirstStepReached:
        mark("first step")


if __name__ == "__main__":
    main()
