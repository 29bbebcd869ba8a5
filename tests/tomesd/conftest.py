"""A small stand-in network with transformer blocks, and helpers that run and inspect it."""

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.seen = 0

    def forward(self, x, context=None, mask=None):
        self.seen = x.shape[1]
        source = x if context is None else context
        mask = None if mask is None else mask.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(source), self.v(source), attn_mask=mask)


class BasicTransformerBlock(nn.Module):
    """As in CompVis's code: gradient checkpointing, in training, is inside the block's forward."""

    reentrant = False

    def __init__(self, dim):
        super().__init__()
        self.attn1, self.attn2 = Attention(dim), Attention(dim)
        self.ff = nn.Linear(dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context=None):
        if self.training:
            return checkpoint(self._forward, x, context, use_reentrant=self.reentrant)
        return self._forward(x, context)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class Net(nn.Module):
    """A block at full and one at half resolution; returns (everything, the output of the first block)."""

    def __init__(self, block=BasicTransformerBlock, dim=8):
        super().__init__()
        self.conv = nn.Conv2d(4, dim, 3, padding=1)
        self.down = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.fine, self.coarse = block(dim), block(dim)

    def forward(self, x, context=None):
        h = self.conv(x)
        fine = self.fine(h.flatten(2).transpose(1, 2), context)
        coarse = self.coarse(self.down(h).flatten(2).transpose(1, 2), context)
        return fine.mean(dim=1) + coarse.mean(dim=1), fine


@pytest.fixture(scope="session")
def block_class():
    return BasicTransformerBlock


@pytest.fixture(scope="session")
def make_net():
    """block class -> the network, always with the same weights."""

    def make(block=BasicTransformerBlock):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net(block).eval()

    return make


@pytest.fixture
def net(make_net):
    return make_net()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def latents():
    def make(batch=2, h=8, w=8, seed=1):
        return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def output(latents):
    """(network, latents) -> the output of its first block."""

    def run(model, x=None, **kwargs):
        return model(latents() if x is None else x, **kwargs)[1]

    return run


@pytest.fixture(scope="session")
def everything():
    """module -> all that a patch could leave behind: classes, attributes and hooks, in their order."""
    kinds = (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    )

    def look(model):
        return [
            (name, type(module), sorted(vars(module)), [list(getattr(module, kind).items()) for kind in kinds])
            for name, module in model.named_modules()
        ]

    return look
