"""Quantized layers against recorded outputs of the reference implementation."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from qdiff.config import QuantConfig
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quantizers import Quantizer, UniformAffineQuantizer

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "q_unit.safetensors")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)), (2, 4, 5, 6)),
    "conv2d with all options": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        (2, 4, 9, 8),
    ),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    return make(), random(*shape)


def switch(module, weights, acts):
    for name, quantizer in module.named_modules():
        if isinstance(quantizer, Quantizer):
            quantizer.enabled = weights if "weight" in name else acts


def test_recorded_layers(golden, subtests):
    for split in [0, 7]:
        for weights in [False, True]:
            for acts in [False, True]:
                with subtests.test(split=split, weights=weights, acts=acts):
                    layer = nn.Conv2d(10, 6, 1)
                    layer.load_state_dict({name: golden[f"quantmodule/{name}"] for name in ("weight", "bias")})
                    config = QuantConfig(scale_method="mse")
                    module = SplitQuantModule(layer, config, split) if split else QuantModule(layer, config)
                    module.fit_weight()
                    x = golden["quantmodule/x"]
                    for name, part in zip(
                        ("act_quantizer", "act_quantizer_0"), x.split([7, 3], 1) if split else [x], strict=False
                    ):
                        getattr(module, name).fit(part)
                    quantizers = {name: part for name, part in module.named_modules() if isinstance(part, Quantizer)}
                    assert len(quantizers) == (4 if split else 2)
                    for name, quantizer in quantizers.items():
                        assert torch.equal(quantizer.delta, golden[f"quantmodule/split{split}/{name}.delta"])
                        assert torch.equal(
                            quantizer.zero_point, golden[f"quantmodule/split{split}/{name}.zero_point"].float()
                        )
                    switch(module, weights, acts)
                    expected = golden[f"quantmodule/split{split}/w{weights:d}a{acts:d}"]
                    error = (module(x) - expected).abs().max() / expected.abs().max()
                    assert error < 1e-6


@torch.no_grad()
def test_a_layer_switched_off_is_the_float_layer(layer_and_input):
    layer, x = layer_and_input
    module = QuantModule(layer, QuantConfig())
    switch(module, False, False)
    assert torch.equal(module(x), layer(x))


@torch.no_grad()
def test_a_layer_works_on_its_quantized_weight_and_input(layer_and_input):
    layer, x = layer_and_input
    module = QuantModule(layer, QuantConfig(weight_bit=3, act_bit=4))
    module.fit_weight()
    module.act_quantizer.fit(x)
    actual = module(x)
    weight = UniformAffineQuantizer(3, channel_wise=True).fit(layer.weight)(layer.weight)
    layer.weight.copy_(weight)
    assert torch.equal(actual, layer(UniformAffineQuantizer(4).fit(x)(x)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision(layer_and_input, dtype):
    layer, x = (thing.to(dtype) for thing in layer_and_input)
    module = QuantModule(layer, QuantConfig())
    module.fit_weight()
    module.act_quantizer.fit(x)
    actual = module(x)
    layer.weight.copy_(module.weight_quantizer(layer.weight))
    assert actual.dtype == dtype
    assert torch.equal(actual, layer(module.act_quantizer(x)))


def test_a_layer_shares_its_parameters(layer_and_input):
    layer, _ = layer_and_input
    module = QuantModule(layer, QuantConfig())
    assert module.original is layer
    assert module.weight is layer.weight and module.bias is layer.bias
    assert [id(parameter) for parameter in module.parameters()] == [id(parameter) for parameter in layer.parameters()]
    assert [key for key in module.state_dict() if "quantizer" not in key] == list(layer.state_dict())


@torch.no_grad()
def test_halves_of_a_split_layer_by_hand():
    layer, x = nn.Conv2d(10, 6, 1), random(2, 10, 4, 4)
    x[:, 7:] *= 20
    module = SplitQuantModule(layer, QuantConfig(), split=7)
    module.fit_weight()
    module.act_quantizer.fit(x[:, :7])
    module.act_quantizer_0.fit(x[:, 7:])
    parts = []
    for columns in (slice(0, 7), slice(7, 10)):
        weight, half = layer.weight[:, columns], x[:, columns]
        weight = UniformAffineQuantizer(4, channel_wise=True).fit(weight)(weight)
        parts.append(F.conv2d(UniformAffineQuantizer(8).fit(half)(half).double(), weight.double()))
    expected = sum(parts) + layer.bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert module.act_quantizer_0.delta > 5 * module.act_quantizer.delta


def test_a_split_outside_of_the_channels_is_refused(subtests):
    for split in [-1, 0, 10, 11]:
        with (
            subtests.test(split=split),
            pytest.raises(ValueError, match=f"^split is {split}: it must lie within the 10 input channels$"),
        ):
            SplitQuantModule(nn.Conv2d(10, 6, 1), QuantConfig(), split)


def test_other_layers_are_refused(subtests):
    for layer in [
        nn.LayerNorm(4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv3d(2, 2, 1),
        nn.Conv2d(4, 4, 3, padding_mode="reflect"),
    ]:
        with (
            subtests.test(layer=layer),
            pytest.raises(
                ValueError, match=rf"^cannot quantize {type(layer).__name__}\(.*: Linear, Conv1d and Conv2d with"
            ),
        ):
            QuantModule(layer, QuantConfig())


def test_settings_reach_the_quantizers_of_a_layer():
    config = QuantConfig(
        weight_bit=3, act_bit=5, act_symmetric=True, scale_method="mse", act_scale_method="max_scale", sm_abit=7
    )
    module = SplitQuantModule(nn.Conv2d(10, 6, 1), config, split=7)
    for quantizer in (module.weight_quantizer, module.weight_quantizer_0):
        assert (quantizer.n_bits, quantizer.symmetric, quantizer.channel_wise) == (3, False, True)
        assert (quantizer.scale_method, quantizer.always_zero) == ("mse", False)
    for quantizer in (module.act_quantizer, module.act_quantizer_0):
        assert (quantizer.n_bits, quantizer.symmetric, quantizer.channel_wise) == (5, True, False)
        assert (quantizer.scale_method, quantizer.always_zero) == ("max_scale", False)


@torch.no_grad()
def test_inputs_stay_float_without_act_quantizers(layer_and_input):
    layer, x = layer_and_input
    module = QuantModule(layer, QuantConfig(quant_act=False))
    module.fit_weight()
    assert module.quantized_input(x) is x
    assert not any(isinstance(part, Quantizer) for name, part in module.named_modules() if "act" in name)
