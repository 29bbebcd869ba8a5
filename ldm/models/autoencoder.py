"""The autoencoder between pictures and latents."""

import pytorch_lightning as pl
import torch
import torch.nn as nn

from ldm.compat import check_neutral
from ldm.lr_scheduler import with_scheduler
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class AutoencoderKL(pl.LightningModule):
    """Variational autoencoder (Rombach et al. 2022): pictures [B, 3, H, W] in [-1, 1] <-> latents [B, z, H/f, W/f].

    `ddconfig` are the arguments of Encoder and Decoder; `embed_dim` the channels of the latents; `lossconfig` the
    objective, needed for training only; `monitor` the logged value that decides which checkpoint is best. The other
    arguments of CompVis's class (`neutral`) are accepted at the values that change nothing, and refused at others.
    """

    def __init__(
        self,
        ddconfig: dict,
        lossconfig: dict,
        embed_dim: int,
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: dict | None = None,
        **neutral,
    ):
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
        self.learning_rate = 1e-4  # scripts/train.py sets the config's base_learning_rate
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Starts as a nearly linear map that keeps the signal's variance, with a narrow posterior.

        PyTorch's own initialisation loses a factor of sqrt(3) at each of a dozen convolutions in a row: colours then
        take thousands of steps to come through.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttnBlock):
                zero_module(module.conv2 if isinstance(module, ResnetBlock) else module.proj_out)
        self.quant_conv.weight[self.embed_dim :] *= 0.1
        self.quant_conv.bias[self.embed_dim :] = -8.0

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior over latents. Raises ValueError for sides that are not multiples of f."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, embed_dim, h, w] -> pictures [B, 3, f h, f w], about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    @torch.no_grad()
    def normalise_latents(self, x: torch.Tensor) -> None:
        """Gives each latent channel mean 0 and variance 1 over the pictures x [B, 3, H, W]; decoding undoes it exactly.

        The affine map is folded into the 1x1 convolutions on either side of the latents.
        """
        posterior = self.encode(x)
        mean = posterior.mean.mean(dim=[0, 2, 3])
        std = (posterior.mean.var(dim=[0, 2, 3]) + posterior.var.mean(dim=[0, 2, 3])).sqrt()
        inner, outer = self.quant_conv, self.post_quant_conv
        n = self.embed_dim
        inner.weight[:n] /= std[:, None, None, None]
        inner.bias[:n] = (inner.bias[:n] - mean) / std
        inner.bias[n:] -= 2 * std.log()  # log variances
        outer.bias += outer.weight[:, :, 0, 0] @ mean
        outer.weight *= std[None, :, None, None]

    def get_input(self, batch: dict) -> torch.Tensor:
        """Pictures [B, 3, H, W] from a batch's [B, H, W, 3]."""
        return batch[self.image_key].permute(0, 3, 1, 2).contiguous()

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        inputs = self.get_input(batch)
        loss, parts = self.loss(inputs, *self(inputs))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        inputs = self.get_input(batch)
        _, parts = self.loss(inputs, *self(inputs, sample_posterior=False))
        self.log_dict({f"val/{name}": value for name, value in parts.items()}, prog_bar=True, batch_size=len(inputs))

    @torch.no_grad()
    def log_images(self, batch: dict, n: int = 8) -> dict[str, torch.Tensor]:
        """Pictures and their reconstructions, [n, 3, H, W] in [-1, 1]."""
        inputs = self.get_input(batch)[:n]
        return {"inputs": inputs, "reconstructions": self(inputs, sample_posterior=False)[0]}

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        return with_scheduler(optimizer, self.scheduler_config)
