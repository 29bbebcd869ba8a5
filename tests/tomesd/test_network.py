"""Where the network and its blocks are found, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import tomesd


class Quantized(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net

    def forward(self, x, context=None):
        return self.model(x, context)


class LatentDiffusion(nn.Module):
    """The network at model.diffusion_model, beside other parts."""

    def __init__(self, net):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = net
        self.first_stage_model = nn.Linear(1, 1)


WRAPPERS = {
    "quantized": Quantized,
    "latent diffusion": LatentDiffusion,
    "pipeline": lambda net: SimpleNamespace(unet=net, vae=nn.Linear(1, 1)),
    "quantized in a pipeline": lambda net: SimpleNamespace(unet=Quantized(net)),
}


def test_the_network_is_found_wherever_it_is(net, no_grad, output, everything):
    expected = output(tomesd.apply_patch(copy.deepcopy(net)))
    before = everything(net)
    for kind, wrap in WRAPPERS.items():
        model = wrap(net)
        assert tomesd.apply_patch(model) is model, kind
        assert torch.equal(output(net), expected), kind
        assert [count.name for count in tomesd.token_report(model)] == ["fine", "coarse"], kind
        assert tomesd.remove_patch(model) is model, kind
        assert everything(net) == before, kind


def test_a_subclass_is_merged_as_the_block_itself(net, make_net, block_class, no_grad, output):
    quantized = make_net(type("QuantBlock", (block_class,), {}))
    assert torch.equal(output(tomesd.apply_patch(quantized)), output(tomesd.apply_patch(net)))
    assert tomesd.token_report(quantized) == tomesd.token_report(net)


def test_models_without_blocks_are_refused():
    with pytest.raises(ValueError, match="no BasicTransformerBlock found in Linear"):
        tomesd.apply_patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module and has no `unet`"):
        tomesd.apply_patch("unet")


def test_blocks_of_another_architecture_are_refused(net, everything):
    del net.coarse.ff
    before = everything(net)
    with pytest.raises(ValueError, match="block coarse has no ff"):
        tomesd.apply_patch(net)
    assert everything(net) == before
