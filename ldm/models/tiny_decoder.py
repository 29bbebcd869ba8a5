"""Read the file of a tiny decoder (`ldm.modules.diffusionmodules.tiny`), as TAESD and diffusers write it."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import is_plain, read_weights
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from ldm.util import without_weights

# How the files of other programs begin the names of the decoder's layers, and the number of the first layer there.
# TAESD's own have only numbers, and count the squeezing of the latents as layer 0.
DIFFUSERS, TAESD = "decoder.layers.", ""
FIRST = {DIFFUSERS: 0, TAESD: 1}


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
