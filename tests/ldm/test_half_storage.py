"""Weights in half precision that compute in float32."""

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ldm import half_storage
from ldm.half_storage import drop_mapped, keep_in_half


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


def resident(path):
    """Return how many bytes of a mapped file this process holds in memory."""
    lines, sizes = Path("/proc/self/smaps").read_text().splitlines(), []
    for i, line in enumerate(lines):
        if line.endswith(str(path)):
            sizes.append(next(int(each.split()[1]) for each in lines[i:] if each.startswith("Rss:")))
    return 1024 * sum(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told what a process needs no more")
def test_pages_of_one_file_go_and_are_read_again(tmp_path):
    maps = {}
    for name in ("the weights.bin", "others.bin"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 4096)
        with open(tmp_path / name, "rb") as file:
            maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    first = {name: bytes(pages) for name, pages in maps.items()}
    before = [resident(tmp_path / name) for name in maps]
    drop_mapped(tmp_path / "the weights.bin")
    assert before == [2**20, 2**20]
    assert [resident(tmp_path / name) for name in maps] == [0, 2**20]
    assert {name: bytes(pages) for name, pages in maps.items()} == first


MEASURE = """
import resource
from pathlib import Path

import torch

from ldm.half_storage import reuse_freed


def faults(size=48):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.full((size * 2**18,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


faults()
outside, before = faults(), megabytes()
try:
    with reuse_freed():
        faults(96)  # an aligned tensor of one size need not fit into the memory of another of that size
        inside, kept = faults(), megabytes() - before
        raise KeyError
except KeyError:
    print(outside, inside, kept, megabytes() - before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory is kept")
def test_freed_memory_is_used_again_within_the_block_only():
    """In a process of its own: what an allocator does depends on all that it did before."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    outside, inside, kept, left, after = map(float, done.stdout.split())
    assert inside < outside / 2 and kept > 50
    assert left < 20 and after > outside / 2
