"""A tiny decoder on integer codes, against itself in floats and against its quantizers in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules.tiny import TinyBlock, TinyDecoder
from qdiff.engine.backends import onednn
from qdiff.engine.decoder.tiny import DynamicConv, IntegerTinyDecoder, quantized

pytestmark = pytest.mark.skipif(
    onednn.largest_exact_weight() < onednn.LARGEST, reason="no exact kernels for weights of 8 bits"
)


@pytest.fixture(scope="module")
def decoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyDecoder(width=16).eval().requires_grad_(False)


def lowered(decoder, dtype=torch.float32):
    copy = TinyDecoder(width=16).eval().requires_grad_(False)
    copy.load_state_dict(decoder.state_dict())
    return IntegerTinyDecoder(copy.to(dtype).to(memory_format=torch.channels_last), dtype)


def fake_quantized(x):
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def reference_conv(layer, x):
    """Return a convolution's output by float64, with the quantizers that the module's docstring describes."""
    step = layer.weight.double().flatten(1).abs().amax(1).view(-1, 1, 1, 1) / 127
    weight = (layer.weight / step).round() * step
    return F.conv2d(fake_quantized(x.double()), weight, None if layer.bias is None else layer.bias.double(), padding=1)


def reference(decoder, z):
    first, _, *middle, last = decoder.layers
    x = F.conv2d((z.double() / 3).tanh() * 3, first.weight.double(), first.bias.double(), padding=1).relu()
    for layer in middle:
        if isinstance(layer, TinyBlock):
            h = reference_conv(layer.conv[2], reference_conv(layer.conv[0], x).relu()).relu()
            x = (reference_conv(layer.conv[4], h) + x).relu()
        else:
            x = reference_conv(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
    return F.conv2d(x, last.weight.double(), last.bias.double(), padding=1) * 2 - 1


def test_layers_are_those_of_their_quantizers(decoder):
    block = decoder.layers[2]
    conv, layer = block.conv[0], DynamicConv(block.conv[0], torch.float32)
    for low in (-1.0, 0.0):  # with a zero point, and without
        x = (
            torch.rand(1, 16, 9, 7)
            .mul_(3)
            .clamp_min_(low + 0.5)
            .sub_(0.5)
            .contiguous(memory_format=torch.channels_last)
        )
        expected = reference_conv(conv, x)
        assert (layer(*quantized(x)) - expected).abs().max() < 1e-5 * expected.abs().max()
    negative = x - 1  # from a range that begins at 0, values below are those of the ReLU
    expected = reference_conv(conv, negative.relu())
    assert (layer(*quantized(negative, relu=True)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pictures_are_those_of_its_quantizers(decoder):
    for size in ((9, 7), (1, 1), (8, 16)):
        z = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
        expected, floats = reference(decoder, z), decoder(z)
        scale = floats.std()
        got = lowered(decoder)(z.contiguous(memory_format=torch.channels_last))
        assert got.shape == floats.shape and got.dtype == torch.float32
        # Rounding in float32 gives values beside a border the other code, and these make others.
        assert (got - expected).abs().mean() < 1e-2 * scale
        assert (got - floats).abs().mean() < 3e-2 * scale
        half = lowered(decoder, torch.bfloat16)(z.bfloat16().contiguous(memory_format=torch.channels_last))
        assert (half - floats).abs().mean() < 4e-2 * scale


def test_maps_of_zeros_and_of_negatives_have_codes(decoder):
    """Both have no range above 0."""
    quiet = TinyDecoder(width=16).eval().requires_grad_(False)
    for value in (0.0, -1.0):
        for parameter in quiet.parameters():
            parameter.fill_(value if parameter.ndim == 1 else 0)
        z = torch.randn(1, 4, 3, 5)
        assert torch.equal(lowered(quiet)(z), quiet(z))


def test_what_is_not_finite_has_no_codes():
    for relu in (False, True):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="NaN or infinite features"):
                quantized(torch.tensor([0.0, value]).view(1, 1, 1, 2), relu=relu)
