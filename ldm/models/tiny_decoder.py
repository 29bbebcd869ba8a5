"""A tiny decoder from latents to pictures: TAESD's architecture (Bohan, https://github.com/madebyollin/taesd).

Its input are latents as the UNet has them, scaled, not as the autoencoder's own decoder takes them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import is_plain, read_weights
from ldm.util import without_weights

BLOCKS = (3, 3, 3, 1)  # residual blocks at each size; the size doubles after all but the last
FACTOR = 2 ** (len(BLOCKS) - 1)  # pixels of a latent, along a side
LIMIT = 3.0  # latents are squeezed into (-LIMIT, LIMIT)

# How the files of other programs begin the names of the decoder's layers, and the number of the first layer there.
# TAESD's own have only numbers, and count the squeezing of the latents as layer 0.
DIFFUSERS, TAESD = "decoder.layers.", ""
FIRST = {DIFFUSERS: 0, TAESD: 1}


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


def read_tiny_decoder(path: str | Path) -> TinyDecoder:
    """Return the decoder in a file of TAESD (taesd_decoder.pth or .safetensors) or of diffusers (AutoencoderTiny).

    An encoder in the file is left out. Raises ValueError if the file holds no such decoder, FileNotFoundError if there
    is none.
    """
    tensors = read_weights(path)
    layout = DIFFUSERS if any(name.startswith(DIFFUSERS) for name in tensors) else TAESD
    weights = {
        f"layers.{number}.{rest}": tensor for name, tensor in tensors.items() for number, rest in _layer(name, layout)
    }
    first = weights.get("layers.0.weight")
    if first is None or first.ndim != 4 or not all(map(is_plain, weights.values())):
        raise ValueError(f"{str(path)!r} holds no tiny decoder: give TAESD's taesd_decoder, or diffusers' file of it")
    with without_weights():  # a damaged file may ask for more than there is memory
        decoder = TinyDecoder(channels=first.shape[1], width=first.shape[0])
    try:
        decoder.load_state_dict(_floats(weights, str(path)), assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{str(path)!r} is no tiny decoder of TAESD's architecture: {reason}") from error
    return decoder.eval()


def _layer(name: str, layout: str) -> list[tuple[int, str]]:
    """Return the layer's number in diffusers' layout and the rest of the name; nothing for another name."""
    found = re.fullmatch(rf"{re.escape(layout)}(\d+)\.(.+)", name)
    return [(int(found[1]) - FIRST[layout], found[2])] if found else []


def _floats(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of {source!r} is not of finite floating-point numbers: the file is damaged")
    return {name: tensor.float() for name, tensor in weights.items()}
