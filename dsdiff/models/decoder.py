"""The decoder that pictures are made with: which one a model and a device have, and how it is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdiff.models.configs import look_up, read_config
from dsdiff.models.registry import TINY_DECODERS
from dsdiff.models.spec import ModelSpec
from dsdiff.options import VAES
from ldm.fileio import file_sha256
from ldm.half_storage import give_back_freed, reuse_freed
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import FACTOR, TinyDecoder
from qdiff.decoder_ranges import Ranges
from qdiff.engine.backends import onednn
from qdiff.engine.cpu import has_bfloat16
from qdiff.engine.decoder import streamed, whole
from qdiff.engine.decoder.layers import Convolution, FloatConvolution, IntegerConvolution, Kernel
from qdiff.engine.decoder.network import FastDecoder
from qdiff.engine.decoder.tiny import IntegerTinyDecoder

FLOAT32, BF16, INT8, TINY = VAES
AnyTinyDecoder = TinyDecoder | IntegerTinyDecoder


def choose_vae(wanted: str | None, ranges: Ranges, device: torch.device) -> str:
    """Return the decoder asked for, or the fastest that there is: int8, then bf16, then float32.

    ranges: of the model's decoder, empty if it has none. Raises ValueError if int8 is asked for and cannot be had.
    """
    reason = _why_no_int8(ranges, device)
    if wanted == INT8 and reason is not None:
        raise ValueError(f"--vae int8: {reason}; use --vae bf16 or float32")
    if wanted is not None:
        return wanted
    if device.type != "cpu":
        return FLOAT32
    if reason is None:
        return INT8
    return BF16 if has_bfloat16() else FLOAT32


def _why_no_int8(ranges: Ranges, device: torch.device) -> str | None:
    if not ranges:
        return "the model's decoder has no calibrated ranges, which a file of scripts/export.py has"
    if device.type != "cpu":
        return f"there are no kernels for {device.type}: they run on the CPU"
    if not _has_exact_kernels():
        return "this CPU, or this build of PyTorch, has no exact kernels for weights of 8 bits"
    return None


@torch.no_grad()
def fast_decoder(autoencoder: AutoencoderKL, vae: str, ranges: Ranges) -> FastDecoder:
    """Return a decoder in float32, bfloat16 or integers, with weights of its own.

    Raises ValueError if the ranges are not those of the autoencoder's decoder.
    """
    dtype = torch.bfloat16 if vae == BF16 or (vae == INT8 and has_bfloat16()) else torch.float32

    def make(kernel: Kernel) -> Convolution:
        if vae != INT8:
            return FloatConvolution(kernel, dtype)
        if kernel.name not in ranges:
            raise ValueError(f"the ranges of the decoder are another model's: they lack {kernel.name}")
        return IntegerConvolution(kernel, dtype, ranges[kernel.name], onednn.OneDNNLayer)

    return FastDecoder(autoencoder.decoder, autoencoder.post_quant_conv, make)


def decode(decoder: FastDecoder, z: Tensor, *, tiling: bool) -> Tensor:
    """Return the pictures [B, 3, H, W], about [-1, 1] and not clamped, of unscaled latents z [B, C, h, w].

    tiling: in stripes, on less memory.
    """
    give_back_freed()  # what sampling has left
    with reuse_freed():
        return (streamed if tiling else whole).decode(decoder, z, between=give_back_freed)


# --- tiny ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TinyFile:
    """The file of a tiny decoder, and its SHA-256."""

    path: str
    sha256: str


def find_tiny(spec: ModelSpec, given: Path | None) -> TinyFile:
    """Return the file of the tiny decoder: the one given, or the one of models with the same autoencoder.

    Raises FileNotFoundError without one, and ValueError for a model whose latents are of another size.
    """
    own = _autoencoder(spec.config)
    known = [file for config, file in TINY_DECODERS.items() if _autoencoder(read_config(config)) == own]
    path = given or (known[0] if known else None)
    if path is None or not path.is_file():
        where = "" if path is None else f" at {str(path)!r}"
        raise FileNotFoundError(f"no tiny decoder{where}: give TAESD's file, or another, with --tiny_decoder")
    if spec.factor != FACTOR:
        raise ValueError(
            f"--vae tiny: a latent of this model stands for {spec.factor} pixels, a tiny one's for {FACTOR}"
        )
    return TinyFile(path=str(path), sha256=file_sha256(path))


def _autoencoder(config: Mapping[str, Any]) -> Any:
    """Return how a config describes the autoencoder, whose latents a tiny decoder knows."""
    return look_up(config, "model.params.first_stage_config.params.ddconfig")


def load_tiny(file: TinyFile, channels: int, device: torch.device) -> AnyTinyDecoder:
    """Return a tiny decoder: on a CPU with exact kernels on integers, in bfloat16 on others that compute in it.

    Raises ValueError for one of other latents.
    """
    decoder = read_tiny_decoder(file.path)
    own = next(decoder.parameters()).shape[1]
    if own != channels:
        raise ValueError(f"{file.path!r} decodes latents of {own} channels, the model's have {channels}")
    dtype = torch.bfloat16 if device.type == "cpu" and has_bfloat16() else torch.float32
    decoder.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    return IntegerTinyDecoder(decoder, dtype) if device.type == "cpu" and _has_exact_kernels() else decoder


def _has_exact_kernels() -> bool:
    return onednn.largest_exact_weight() >= onednn.LARGEST


@torch.no_grad()
def decode_tiny(decoder: AnyTinyDecoder, z: Tensor) -> Tensor:
    """Return the pictures [B, 3, H, W], float32, about [-1, 1] and not clamped, of scaled latents z [B, C, h, w]."""
    dtype = next(decoder.parameters()).dtype
    return decoder(z.to(dtype).contiguous(memory_format=torch.channels_last)).float()


# --- all of a model ------------------------------------------------------------------------------------------


class Decoders:
    """The decoders of a model, each made at first use.

    channels: of its latents. ranges: of its decoder, for int8. made: called when a fast decoder was made, which holds
    weights of its own.
    """

    def __init__(self, channels: int, ranges: Ranges, made: Callable[[], object]):
        self.channels, self.ranges, self.made = channels, ranges, made
        self._fast: dict[str, FastDecoder] = {}  # by the name of what it computes in
        self._tiny: dict[TinyFile, AnyTinyDecoder] = {}

    def clear(self) -> None:
        """Drop those that were made of a model, as another one is loaded."""
        self._fast.clear()

    def tiny(self, file: TinyFile, device: torch.device) -> AnyTinyDecoder:
        """Return the tiny decoder of a file. Raises ValueError for a file that is none, or of other latents."""
        if file not in self._tiny:
            self._tiny[file] = load_tiny(file, self.channels, device)
        return self._tiny[file]

    @torch.no_grad()
    def decode(self, model: LatentDiffusion, latents: Tensor, vae: str, tiling: bool, tiny: TinyFile | None) -> Tensor:
        """Return the pictures [B, 3, H, W], float32, about [-1, 1], on the CPU, of scaled latents [B, C, h, w].

        vae, tiling, tiny: see DrawSettings. One picture at a time, which needs little memory.
        """
        if tiny is not None:
            decoder = self.tiny(tiny, model.device)
            images = [decode_tiny(decoder, latent[None]).cpu() for latent in latents]
        elif vae == FLOAT32 and not tiling:
            images = [model.decode_first_stage(latent[None].float()).cpu() for latent in latents]
        else:
            if vae not in self._fast:
                self._fast[vae] = fast_decoder(model.first_stage_model, vae, self.ranges)
                self.made()
            scaled = latents.float() / model.scale_factor
            images = [decode(self._fast[vae], z[None], tiling=tiling).cpu() for z in scaled]
        return torch.cat(images)
