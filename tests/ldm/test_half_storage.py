"""Weights in half precision that compute in float32."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ldm import half_storage
from ldm.half_storage import keep_in_half


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(4, 64), nn.Flatten(2), nn.Linear(36, 300)).eval()


def test_it_computes_in_float32_and_stays_in_half(network):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    rounded = [parameter.detach().half().float() for parameter in network.parameters()]
    for parameter, values in zip(network.parameters(), rounded, strict=True):
        parameter.data = values
    expected = network(x)
    actual = keep_in_half(network)(x)
    assert actual.dtype == torch.float32 and torch.allclose(actual, expected, atol=1e-5)
    assert all(parameter.dtype == torch.float16 for parameter in network.parameters())
    assert torch.equal(network(x), actual)


def test_embeddings_give_float32():
    layer = keep_in_half(nn.Embedding(10, 4))
    assert layer(torch.tensor([3])).dtype == torch.float32 and layer.weight.dtype == torch.float16


def test_after_an_error_it_is_in_half_still(network):
    keep_in_half(network)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 5, 8, 8))
    assert all(parameter.dtype == torch.float16 for parameter in network.parameters())


def test_weights_of_a_mapped_file_survive_being_given_back(tmp_path, monkeypatch):
    given, advise = [], half_storage._madvise()
    monkeypatch.setattr(half_storage, "_madvise", lambda: lambda *args: given.append(advise(*args)) if advise else None)
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).half()
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    layer = nn.Linear(512, 512, bias=False)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        layer.load_state_dict({"weight": file.get_tensor("weight")}, assign=True)
    keep_in_half(layer)
    first = layer(torch.eye(512))
    assert len(given) == (1 if advise else 0)
    assert torch.equal(first, weight.float().T) and torch.equal(layer(torch.eye(512)), first)
