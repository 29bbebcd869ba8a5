"""Pictures by OpenVINO: it runs text encoder, UNet and decoder, and our Pipeline all else. Runs in a `child` only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdiff.benchmark import peers_openvino
from dsdiff.benchmark.pictures.by_us import draw_with
from dsdiff.benchmark.pictures.request import Clock, PictureRequest
from dsdiff.draw_settings import DrawSettings
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, ModelOptions
from dsdiff.pipeline import Pipeline
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import for_inference, instantiate_from_config, without_weights


class Compiled(nn.Module):
    """A network that OpenVINO runs, for inputs of these shapes."""

    def __init__(self, xml: str, precision: str, shapes: Sequence[Sequence[int]]):
        super().__init__()
        self.request, _ = peers_openvino.compiled(Path(xml), precision, shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self.request.infer([tensor.contiguous().numpy() for tensor in inputs])
        return torch.from_numpy(next(iter(outputs.values())))


class CompiledDenoiser(peers_openvino.CompiledUNet):
    """The UNet. It was converted with whole timesteps, to which DPM-Solver's are rounded."""

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, timesteps.round().long(), context)


class CompiledText(nn.Module):
    """A text encoder, one prompt at a time: our tokens, and OpenVINO's tower."""

    def __init__(self, encoder: FrozenCLIPEmbedder, xml: str, precision: str):
        super().__init__()
        self.tokenize = encoder.tokenize
        self.tower = Compiled(xml, precision, [(1, encoder.max_length)])

    def forward(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self.tower(tokens[None]) for tokens in self.tokenize(prompts)])


class CompiledDecoder(nn.Module):
    """The part of an autoencoder that a Pipeline calls to decode. A tiny decoder takes its place."""

    def __init__(self, xml: str, precision: str, shape: Sequence[int], scale: float):
        super().__init__()
        self.decoder, self.scale = Compiled(xml, precision, [shape]), scale

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [1, 3, H, W] of latents [1, C, h, w], which are multiplied by `scale` first."""
        return self.decoder(latents * self.scale)


class OpenVINOPipeline(Pipeline):
    """A Pipeline whose networks are compiled by OpenVINO from the files of a request."""

    def __init__(self, request: PictureRequest, **others: Any):
        super().__init__(find_model(ModelOptions(ckpt=Path(request.ckpt), config=Path(request.config))), **others)
        self._held.hold(self._compiled(request))

    def _compiled(self, request: PictureRequest) -> LatentDiffusion:
        files, settings = request.files, self.resolve(options(request))
        _, precision = peers_openvino.FILES[request.name]
        with without_weights():
            model = instantiate_from_config(for_inference(self.spec.config["model"])).eval()
        encoder = model.cond_stage_model
        if self.tokenizer is not None:
            encoder.set_tokenizer(self.tokenizer)
        shape = latent_shape(self, settings)
        batch = 1 if settings.scale == 1 else 2
        width = self.spec.config["model"]["params"]["unet_config"]["params"]["context_dim"]
        inputs = [torch.empty(size) for size in ((batch, *shape), (batch,), (batch, encoder.max_length, width))]
        model.cond_stage_model = CompiledText(encoder, files["text"], precision)
        model.model.diffusion_model = CompiledDenoiser(Path(files["unet"]), precision, inputs)
        # A tiny decoder takes latents as the UNet has them, which a LatentDiffusion has divided by its scale.
        scale = float(model.scale_factor) if request.tiny else 1.0
        model.first_stage_model = CompiledDecoder(files["decoder"], precision, (1, *shape), scale)
        return model


def draw(request: PictureRequest, clock: Clock) -> str:
    """Draw the picture of a request; return facts in words."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    tokenizer = None if request.tokenizer is None else Path(request.tokenizer)
    pipeline = OpenVINOPipeline(request, device="cpu", tokenizer=tokenizer)
    draw_with(pipeline, pipeline.resolve(options(request)), request, clock)
    return f"the rest, text encoder and decoder in {peers_openvino.FILES[request.name][1]}"


def options(request: PictureRequest) -> DrawOptions:
    """Return how to draw; merging is in the compiled UNet."""
    plain: dict[str, Any] = {"precision": "full", "vae": "float32"}  # so that the Pipeline calls networks as they are
    return DrawOptions(sampler=request.sampler, steps=request.steps, scale=request.scale, **plain)


def latent_shape(pipeline: Pipeline, settings: DrawSettings) -> tuple[int, int, int]:
    """Return [C, h, w] of a picture's latents."""
    factor = pipeline.spec.factor
    return pipeline.spec.channels, settings.height // factor, settings.width // factor
