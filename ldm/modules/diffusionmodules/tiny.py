"""A tiny decoder from latents to pictures: TAESD's architecture (Bohan, https://github.com/madebyollin/taesd).

Its input are latents as the UNet has them, scaled, not as the autoencoder's own decoder takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (3, 3, 3, 1)  # residual blocks at each size; the size doubles after all but the last
FACTOR = 2 ** (len(BLOCKS) - 1)  # pixels of a latent, along a side
LIMIT = 3.0  # latents are squeezed into (-LIMIT, LIMIT)


class TinyBlock(nn.Module):
    """A residual block of three convolutions of 3x3 with ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Scaled latents z [B, channels, h, w] -> pictures [B, 3, 8 h, 8 w], about [-1, 1] and not clamped.

    channels: of the latents. width: of all layers. `layers` has the numbers of diffusers' AutoencoderTiny.
    """

    def __init__(self, channels: int = 4, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for stage, blocks in enumerate(BLOCKS):
            last = stage == len(BLOCKS) - 1
            layers += [TinyBlock(width) for _ in range(blocks)]
            layers += [] if last else [nn.Upsample(scale_factor=2)]
            layers.append(nn.Conv2d(width, 3 if last else width, 3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.pictures(self.layers(self.squeezed(z)))

    @staticmethod
    def squeezed(z: Tensor) -> Tensor:
        """Return latents within (-LIMIT, LIMIT), which the layers take."""
        return torch.tanh(z / LIMIT) * LIMIT

    @staticmethod
    def pictures(out: Tensor) -> Tensor:
        """Return the pictures of the layers' output, which is in [0, 1]."""
        return out * 2 - 1
