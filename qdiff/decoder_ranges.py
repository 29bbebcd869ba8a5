"""Fit the ranges of an autoencoder's decoder, so that it can run on integer codes (`qdiff.engine.decoder`)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder
from qdiff.engine.decoder.layers import STRIPE, FloatConvolution, Kernel
from qdiff.engine.decoder.network import FastDecoder
from qdiff.engine.decoder.whole import decode
from qdiff.engine.layers import params_of
from qdiff.engine.quant_params import QuantParams
from qdiff.quantizers import UniformAffineQuantizer

BITS = 8
HIGH = 2**BITS - 1  # the largest code
VALUES = 1024  # of a stripe to which the range is fitted, besides its extremes

Ranges = dict[str, QuantParams]


class Observed(FloatConvolution):
    """A convolution in float32 that keeps some values of its operands. kept: name -> values, to which it adds."""

    def __init__(self, kernel: Kernel, kept: dict[str, list[Tensor]]):
        super().__init__(kernel, torch.float32)
        self.kept = kept.setdefault(kernel.name, [])
        self.generator = torch.Generator().manual_seed(0)

    def operand(self, x: Tensor) -> Tensor:
        return self._keep(super().operand(x))

    def normed(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        return self._keep(super().normed(norm, x, silu=silu))

    def _keep(self, x: Tensor) -> Tensor:
        values = x.flatten() if x.is_contiguous() else x.permute(0, 2, 3, 1).flatten()
        count = VALUES * max(1, x.shape[2] * x.shape[3] // STRIPE)
        chosen = torch.randint(len(values), (count,), generator=self.generator)
        self.kept += [values[chosen.to(x.device)].cpu(), torch.stack(x.aminmax()).cpu()]
        return x


@torch.no_grad()
def fit_decoder(
    decoder: Decoder, post_quant_conv: nn.Conv2d, z: Tensor, progress: Callable[[int], object] = lambda n: None
) -> Ranges:
    """Return the range of each convolution's input, fitted by mean squared error to decoding unscaled latents z.

    progress(n) is called when n more latents are done. Raises ValueError for latents that give no finite numbers.
    """
    kept: dict[str, list[Tensor]] = {}
    observed = FastDecoder(decoder, post_quant_conv, lambda kernel: Observed(kernel, kept))
    for latent in z:
        decode(observed, latent[None])
        progress(1)
    return {name: _fit(name, torch.cat(values)) for name, values in kept.items() if values}


def _fit(name: str, values: Tensor) -> QuantParams:
    if not bool(values.isfinite().all()):
        raise ValueError(f"the decoder's {name} has inputs that are not finite: it cannot run on integer codes")
    quantizer = UniformAffineQuantizer(n_bits=BITS, scale_method="mse")
    quantizer.fit(values)
    return params_of(quantizer)
