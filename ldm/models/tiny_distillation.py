"""Train a tiny decoder: it learns to undo the encoder of an autoencoder, whose weights stay as they are."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoint import read_weights
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.tiny import FACTOR, TinyDecoder
from ldm.modules.losses import ReconstructionLoss
from ldm.util import instantiate_from_config


class TinyDistillation(nn.Module):
    """A TinyDecoder, with the autoencoder whose latents it learns to decode.

    autoencoder: the config file of that autoencoder. ckpt: its weights, which are not part of the state_dict.
    scale_factor: of the latents, as the UNet has them. width: of the decoder. lossconfig: arguments of
    ReconstructionLoss. scheduler_config: how training changes the learning rate; kept as an attribute. Raises
    ValueError for an autoencoder with another size of latents.
    """

    def __init__(
        self,
        autoencoder: str,
        ckpt: str,
        width: int = 64,
        scale_factor: float = 1.0,
        lossconfig: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.scheduler_config = scheduler_config
        model: AutoencoderKL = instantiate_from_config(OmegaConf.load(autoencoder).model)
        model.load_state_dict({name: value.float() for name, value in read_weights(ckpt).items()})
        if model.factor != FACTOR:
            raise ValueError(
                f"latents of {autoencoder!r} stand for {model.factor} pixels, the tiny decoder's for {FACTOR}"
            )
        self._autoencoder = (model.eval().requires_grad_(False),)  # in a tuple: not a submodule
        self.decoder = TinyDecoder(channels=model.embed_dim, width=width)
        self.loss = ReconstructionLoss(**(lossconfig or {}))

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, on the CPU until `encode` moves it."""
        return self._autoencoder[0]

    @torch.no_grad()
    def encode(self, pictures: Tensor, sample: bool = True) -> Tensor:
        """Return scaled latents of pictures [B, 3, H, W]: drawn from their distribution, or its mode."""
        posterior = self.autoencoder.to(pictures.device).encode(pictures)
        return self.scale_factor * (posterior.sample() if sample else posterior.mode())

    def forward(self, pictures: Tensor, sample: bool = True) -> Tensor:
        """Return what the tiny decoder makes of the pictures' latents, [B, 3, H, W]."""
        return self.decoder(self.encode(pictures, sample))

    def objective(self, pictures: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and its parts by name."""
        return self.loss.compare(pictures, decoded)
