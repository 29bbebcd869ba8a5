"""The autoencoder that maps pictures to latents and back."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from ldm.compat import check_neutral
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class AutoencoderKL(nn.Module):
    """Variational autoencoder (Rombach et al. 2022): pictures [B, 3, H, W] in [-1, 1] <-> latents [B, z, H/f, W/f].

    ddconfig: the arguments of Encoder and Decoder.
    lossconfig: the objective, which only training calls.
    embed_dim: channels of the latents.
    image_key: the pictures' name in a batch.
    monitor, scheduler_config: what training logs and how it changes the learning rate; kept as attributes.
    neutral: the other arguments of CompVis's class, accepted only at the values that change nothing.

    Raises ValueError for a config of another kind of autoencoder.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        **neutral: Any,
    ) -> None:
        super().__init__()
        check_neutral(type(self), neutral, {"ckpt_path": None, "ignore_keys": (), "colorize_nlabels": None})
        if not ddconfig["double_z"]:
            raise ValueError("ddconfig.double_z is False: AutoencoderKL needs mean and variance")
        self.image_key = image_key
        self.monitor = monitor
        self.embed_dim = embed_dim
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.factor = self.encoder.factor
        self.loss = instantiate_from_config(lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.scheduler_config = scheduler_config
        self._initialise()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.post_quant_conv.weight.device

    @torch.no_grad()
    def _initialise(self) -> None:
        """Make the new weights a nearly linear map that keeps the signal's variance, with a narrow posterior.

        PyTorch's own initialisation loses a factor of sqrt(3) at each of a dozen convolutions in a row. Training then
        needs thousands of steps until reconstructions show colours.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttnBlock):
                zero_module(module.conv2 if isinstance(module, ResnetBlock) else module.proj_out)
        assert self.quant_conv.bias is not None
        self.quant_conv.weight[self.embed_dim :] *= 0.1
        self.quant_conv.bias[self.embed_dim :] = -8.0

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior over latents. Raise ValueError for sides that are not multiples of f."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return the pictures [B, 3, f h, f w] of latents [B, embed_dim, h, w], about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Return the reconstructions [B, 3, H, W], from a sample or the mode of the posterior, and the posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    @torch.no_grad()
    def normalise_latents(self, x: torch.Tensor) -> None:
        """Give each latent channel mean 0 and variance 1 over the pictures x [B, 3, H, W]; decoding undoes it exactly.

        The affine map becomes part of the 1x1 convolutions before and after the latents.
        """
        posterior = self.encode(x)
        mean = posterior.mean.mean(dim=[0, 2, 3])
        std = (posterior.mean.var(dim=[0, 2, 3]) + posterior.var.mean(dim=[0, 2, 3])).sqrt()
        inner, outer = self.quant_conv, self.post_quant_conv
        assert inner.bias is not None and outer.bias is not None
        n = self.embed_dim
        inner.weight[:n] /= std[:, None, None, None]
        inner.bias[:n] = (inner.bias[:n] - mean) / std
        inner.bias[n:] -= 2 * std.log()  # log variances
        outer.bias += outer.weight[:, :, 0, 0] @ mean
        outer.weight *= std[None, :, None, None]

    def get_input(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the pictures [B, 3, H, W] of a batch, which holds them as [B, H, W, 3]."""
        return batch[self.image_key].permute(0, 3, 1, 2).contiguous()
