"""Our own pictures, drawn as scripts/txt2img.py draws them. Runs in a `child` only."""

from pathlib import Path

import torch

from dsdiff.benchmark.pictures.request import PROMPT, SEED, Clock, PictureRequest
from dsdiff.draw_settings import DrawSettings
from dsdiff.images.png import to_pictures, write_png
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions, QuantizationOptions
from dsdiff.pipeline import Pipeline

PRECISIONS = {"float32": "full", "bf16": "autocast", "int8-float32": "full"}  # of the UNet; others take the default


def draw(request: PictureRequest, clock: Clock) -> str:
    """Draw the picture of a request; return facts in words."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    tokenizer = None if request.tokenizer is None else Path(request.tokenizer)
    spec = find_model(
        ModelOptions(ckpt=Path(request.ckpt), config=None if is_bundle(request) else Path(request.config))
    )
    pipeline = Pipeline(
        spec, device=request.device, tokenizer=None if spec.bundle else tokenizer, quantization=quantization(request)
    )
    settings = pipeline.resolve(options(request))
    draw_with(pipeline, settings, request, clock)
    rest = "bfloat16" if settings.precision == "autocast" else "float32"
    return f"UNet in {rest} where it is float, decoder in {settings.vae}"


def draw_with(pipeline: Pipeline, settings: DrawSettings, request: PictureRequest, clock: Clock) -> None:
    """Load the model of a pipeline, draw the picture, and write its PNG."""
    model = pipeline.prepare(settings)
    clock.ready()
    encoder = model.cond_stage_model
    getattr(encoder, "transformer", encoder).register_forward_hook(lambda *_: clock.lap("text"))
    latents = pipeline.sample([PROMPT], [SEED], settings, callback=lambda _: clock.step())
    (picture,) = to_pictures(pipeline.decode(latents, settings))
    clock.lap("decoding")
    write_png(Path(request.png), picture)
    clock.lap("png")


def options(request: PictureRequest) -> DrawOptions:
    """Return how to draw."""
    return DrawOptions(
        sampler=request.sampler,
        steps=request.steps,
        scale=request.scale,
        precision=PRECISIONS.get(request.name),
        vae="tiny" if request.tiny else "float32" if request.name == "float32" else None,
        tiny_decoder=Path(request.files["tiny"]) if request.tiny else None,
        merge=MergeOptions(ratio=request.ratio) if request.ratio else None,
    )


def quantization(request: PictureRequest) -> QuantizationOptions | None:
    """Return how the model is quantized; None for a float one."""
    if request.name in ("float32", "bf16"):
        return None
    engine = "simulate" if request.name == "simulate" else "int8"
    cali_ckpt = request.files.get("cali_ckpt")
    return QuantizationOptions(engine=engine, cali_ckpt=None if cali_ckpt is None else Path(cali_ckpt))


def is_bundle(request: PictureRequest) -> bool:
    """Tell whether the weights are a bundle, which holds its config."""
    return quantization(request) is not None and "cali_ckpt" not in request.files
