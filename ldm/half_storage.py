"""Keep the weights of a network in half precision in memory while it computes in float32."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

PAGE_OUT = 21  # advice to the system that pages are not needed soon; those of a file are read again when used
DONT_NEED = 4  # advice that pages of this process are to go now; those of a file stay in the system's cache
# Parameters of glibc's mallopt, and their values: none of its own maps and no trimming, then glibc's first ones.
MMAP_MAX, TRIM_THRESHOLD = -4, -1
KEEP_ALL, MMAPS, TRIMMED = 2**31 - 1, 2**16, 2**25


def keep_in_half(network: nn.Module) -> nn.Module:
    """Store the network's weights in float16 and compute in float32, in place; return the network.

    A layer's weights are float32 only while it runs. The network needs half the memory, and some time to convert.
    Weights that are float16 already are not copied. After each use the system is told that their pages are not needed
    soon, so that weights in a mapped file take no memory.
    """
    network.requires_grad_(False)
    for layer in network.modules():
        own = list(layer.parameters(recurse=False))
        for parameter in own:
            parameter.data = parameter.data.to(torch.float16)
        if isinstance(layer, nn.Embedding):  # only a few of its rows are read: it converts its output
            layer.register_forward_hook(lambda layer, args, output: output.float())
        elif own:
            widened = _Widened()
            layer.register_forward_pre_hook(widened.begin)
            layer.register_forward_hook(widened.end, always_call=True)
    return network


class _Widened:
    """A layer's weights in float32 while it runs. stored: its weights in float16 meanwhile."""

    def __init__(self) -> None:
        self.stored: list[Tensor] = []

    def begin(self, layer: nn.Module, args: tuple) -> None:
        """Replace the weights by float32 copies, before the layer runs."""
        self.stored = [parameter.data for parameter in layer.parameters(recurse=False)]
        for parameter, stored in zip(layer.parameters(recurse=False), self.stored, strict=True):
            # With weights in channels_last, convolutions make no copies of their large inputs and outputs.
            layout = torch.channels_last if stored.ndim == 4 else torch.preserve_format
            parameter.data = stored.to(torch.float32, memory_format=layout)

    def end(self, layer: nn.Module, args: tuple, output: object) -> None:
        """Put the stored weights back, after the layer has run, or failed."""
        for parameter, stored in zip(layer.parameters(recurse=False), self.stored, strict=False):
            parameter.data = stored
            _give_back(stored)
        self.stored = []


def _give_back(weight: Tensor) -> None:
    """Tell the system that the pages of a weight on the CPU are not needed soon."""
    advise = _madvise()
    if advise is None or weight.device.type != "cpu":
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # only whole pages
    size = (weight.data_ptr() + weight.numel() * weight.element_size() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)  # only advice, so a failure does no harm


def drop_mapped(path: Path) -> None:
    """Let go of the pages of a mapped file that this process holds in memory.

    They are read again where they are used. The file's content must not have been changed in memory, which the mapping
    of a file of weights never is. On systems other than Linux nothing happens.
    """
    advise, table = _madvise(), Path("/proc/self/maps")
    if advise is None or not table.exists():
        return
    name = str(path.resolve())
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, rest = line.partition(" ")
        if rest.split(None, 4)[4:] == [name]:
            start, end = (int(address, 16) for address in addresses.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONT_NEED)


def give_back_freed() -> None:
    """Return freed memory to the system, as after loading a model; glibc would keep much of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def reuse_freed() -> Iterator[None]:
    """Keep memory that is freed within the block for what is allocated there, and return it to the system at the end.

    glibc gives each tensor of more than 32 MB fresh pages, and writing to these takes several times as long as to pages
    that are there. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, KEEP_ALL)
    try:
        yield
    finally:
        mallopt(MMAP_MAX, MMAPS)
        mallopt(TRIM_THRESHOLD, TRIMMED)
        give_back_freed()


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """Return the system's madvise(address, length, advice), or None where there is none."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
