"""A layer with all its ranges, to be packed."""

import pytest
import torch

from qdiff import QuantConfig, QuantModule
from qdiff.quant_layer import SplitQuantModule


@pytest.fixture
def quantized():
    """(layer, x, split, **settings) -> the QuantModule or SplitQuantModule of a layer, its ranges fitted to x."""

    def make(layer, x, split=0, **settings):
        config = QuantConfig(**settings)
        module = SplitQuantModule(layer, config, split) if split else QuantModule(layer, config)
        module.requires_grad_(False)
        module.fit_weight()
        if split:
            module.act_quantizer.fit(x[:, :split])
            module.act_quantizer_0.fit(x[:, split:])
        else:
            module.act_quantizer.fit(x)
        return module

    return make


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
