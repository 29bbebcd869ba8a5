"""The decoder in floats and integers, whole and in stripes, against the autoencoder's own decoder."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models.autoencoder import AutoencoderKL
from qdiff.decoder_ranges import fit_decoder
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.decoder import layers, sources, streamed, whole
from qdiff.engine.decoder.attention import attend
from qdiff.engine.decoder.layers import FloatConvolution, IntegerConvolution
from qdiff.engine.decoder.network import FastDecoder

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 16,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "norm_groups": 8,
}


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=4).eval().requires_grad_(False)
        for parameter in network.decoder.parameters():  # no block is the identity, and no norm has weights of 1
            parameter += 0.05 * torch.randn_like(parameter)
    return network


@pytest.fixture
def z():
    return torch.randn(2, 4, 9, 7)


def decoder_of(autoencoder, make):
    return FastDecoder(autoencoder.decoder, autoencoder.post_quant_conv, make)


def psnr(x, reference):
    """Return decibels; pictures have a range of 2."""
    return float(10 * torch.log10(4 / (x - reference).square().mean()))


def test_in_float32_it_is_the_decoder(autoencoder, z, monkeypatch):
    decoder, expected = decoder_of(autoencoder, lambda kernel: FloatConvolution(kernel, torch.float32)), None
    expected = autoencoder.decode(z)
    for stripe in (8192, 100, 1):  # rows of a stripe: all, some, one
        monkeypatch.setattr(layers, "STRIPE", stripe)
        monkeypatch.setattr(sources, "STRIPE", stripe)
        monkeypatch.setattr(streamed, "PIXELS", stripe)
        for way in (whole, streamed):
            assert torch.allclose(way.decode(decoder, z), expected, atol=1e-4), (way, stripe)


def test_in_bfloat16_and_in_integers_it_is_near_it(autoencoder, z):
    ranges, expected = fit_decoder(autoencoder.decoder, autoencoder.post_quant_conv, z), autoencoder.decode(z)
    kinds = {
        "bf16": (lambda kernel: FloatConvolution(kernel, torch.bfloat16), 45),
        "int8": (lambda kernel: IntegerConvolution(kernel, torch.float32, ranges[kernel.name], SimulatedLayer), 35),
    }
    for name, (make, least) in kinds.items():
        decoder = decoder_of(autoencoder, make)
        for way in (whole, streamed):
            assert least < psnr(way.decode(decoder, z), expected) < 100, (name, way)


def test_attention_is_that_of_pytorch():
    q, k, v = torch.randn(3, 1, 32, 6, 5)
    rows = [each.flatten(2).transpose(1, 2) for each in (q, k + 3, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).view(v.shape)
    assert torch.allclose(attend(q, k + 3, v), expected, atol=1e-5)
    halves = attend(*(each.bfloat16() for each in (q, k + 3, v)))
    assert torch.allclose(halves.float(), expected, atol=0.03)


def test_latents_that_give_no_numbers_are_refused(autoencoder):
    with pytest.raises(ValueError, match="not finite"):
        fit_decoder(autoencoder.decoder, autoencoder.post_quant_conv, torch.full((1, 4, 8, 8), float("nan")))


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors that are not on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert all(each.device.type == "meta" for each in args if isinstance(each, torch.Tensor)), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [whole, streamed])
def test_decoding_asks_for_nothing_that_gpus_lack(autoencoder, z, way, dtype, monkeypatch):
    kernel, seen = torch.native_group_norm, []

    def group_norm_of_gpus(x, *args):
        assert x.is_contiguous()
        seen.append(x.shape)
        return kernel(x, *args)

    monkeypatch.setattr(torch, "native_group_norm", group_norm_of_gpus)
    monkeypatch.setattr(layers, "STRIPE", 64)
    network, latents = copy.deepcopy(autoencoder).to("meta"), z.to("meta")
    decoder = FastDecoder(network.decoder, network.post_quant_conv, lambda kernel: FloatConvolution(kernel, dtype))
    with OneDevice():
        assert way.decode(decoder, latents).shape == (2, 3, 36, 28)
    assert seen
