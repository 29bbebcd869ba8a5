"""Layers with all their ranges, to be lowered, and the backends that run here."""

import pytest
import torch
from torch import nn

from qdiff import QuantConfig, QuantModule
from qdiff.engine import native
from qdiff.engine.backends import onednn
from qdiff.engine.lower import backend_for
from qdiff.quant_layer import SplitQuantModule


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tiny work that threads share is slow on a machine that does other work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WAYS = [
    pytest.param(True, id="kernels", marks=pytest.mark.skipif(not native.library(), reason="no C compiler here")),
    pytest.param(False, id="PyTorch"),
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Run a test by our kernels (True), and by PyTorch in their place (False)."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(native, "has_attention", lambda: False)
    return request.param


@pytest.fixture
def channels_last():
    """(*shape, dtype) -> random features in channels_last order."""

    def make(*shape, dtype=torch.bfloat16):
        return (torch.randn(shape) * 1.7 + 0.4).to(dtype).contiguous(memory_format=torch.channels_last)

    return make


@pytest.fixture
def quantized():
    """(layer, x, split, **settings) -> the QuantModule or SplitQuantModule of a layer, static ranges fitted to x."""

    def make(layer, x, split=0, **settings):
        config = QuantConfig(**settings)
        module = SplitQuantModule(layer, config, split) if split else QuantModule(layer, config)
        module.requires_grad_(False)
        module.fit_weight()
        if config.act_range == "dynamic":
            return module
        if split:
            module.act_quantizer.fit(x[:, :split])
            module.act_quantizer_0.fit(x[:, split:])
        else:
            module.act_quantizer.fit(x)
        return module

    return make


@pytest.fixture
def cpu_backend():
    """(**settings) -> the backend for a model with these settings on this CPU.

    Where its sums are not exact it must be refused, with the reason: then this is None, and the test goes on without.
    """

    def choose(**settings):
        config = QuantConfig(**settings)
        largest = onednn.largest_exact_weight()
        if largest == onednn.LARGEST or 2**config.weight_bit - 1 <= largest:
            return backend_for(config, torch.device("cpu"))
        with pytest.raises(ValueError, match="no exact integer kernels"):
            backend_for(config, torch.device("cpu"))
        return None

    return choose


@pytest.fixture
def assert_backends_agree():
    """(actual, expected, case): a result of oneDNN is that of the simulation.

    They are equal bit for bit wherever `onednn.step_order` knows the kernels' order, as on every x86 CPU with
    PyTorch 2.14. Elsewhere, and for convolutions of several groups, the difference is below 2e-7 of the largest output,
    in bfloat16 below the rounding of that.
    """

    def check(actual, expected, case):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, case
        assert actual.stride() == expected.stride(), case
        if onednn.step_order(expected.dtype) is not None and "of groups" not in case:
            assert torch.equal(actual, expected), case
        else:
            limit = {torch.float32: 2e-7, torch.bfloat16: 2**-7}[expected.dtype]
            assert (actual - expected).abs().max() <= limit * expected.abs().max(), case

    return check


# name -> (what makes the layer, the shape of its input)
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 9, 37)),
    "linear of one row": (lambda: nn.Linear(64, 48, bias=False), (1, 64)),
    "linear of a transformer": (lambda: nn.Linear(64, 512), (2, 77, 64)),
    "linear without bias": (lambda: nn.Linear(128, 128, bias=False), (1, 9, 128)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 8, 8)),
    "conv of 4 channels": (lambda: nn.Conv2d(4, 32, 3, padding=1), (2, 4, 16, 16)),
    "conv to 4 channels": (lambda: nn.Conv2d(64, 4, 3, padding=1), (1, 64, 16, 16)),
    "conv, stride 2": (lambda: nn.Conv2d(64, 128, 3, padding=1, stride=2), (2, 64, 16, 16)),
    "conv, stride 2, odd sizes": (lambda: nn.Conv2d(7, 5, 3, padding=1, stride=2), (1, 7, 9, 11)),
    "conv, 1x1": (lambda: nn.Conv2d(8, 8, 1, bias=False), (3, 8, 5, 4)),
    "conv, 1x1, wide": (lambda: nn.Conv2d(128, 64, 1), (2, 128, 5, 7)),
    "conv, kernel 5x3": (lambda: nn.Conv2d(4, 6, (5, 3), padding=(2, 0), stride=(1, 2)), (1, 4, 10, 7)),
    "conv, dilated, of groups": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), (2, 8, 9, 11)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 1), (2, 6, 13)),
    "conv1d, kernel 3": (lambda: nn.Conv1d(6, 9, 3, padding=1, stride=2), (2, 6, 13)),
}
SETTINGS = {
    "W4A8": {},
    "W8A8": {"weight_bit": 8},
    "W3A5": {"weight_bit": 3, "act_bit": 5},
    "W7A8 by mse": {"weight_bit": 7, "scale_method": "mse"},
    "W4A8, signed activations": {"act_symmetric": True},
}


@pytest.fixture
def cases():
    """[(name, layer, shape of its input, settings)], but for grouped convolutions of 8 bits, which are refused."""
    return [
        (f"{name}, {setting}", make(), shape, settings)
        for name, (make, shape) in LAYERS.items()
        for setting, settings in SETTINGS.items()
        if not ("groups" in name and settings.get("weight_bit") == 8)
    ]
