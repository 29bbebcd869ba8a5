"""Weights that stay in half precision in memory, of networks that compute in float32."""

import ctypes
import functools
import mmap
import sys

import torch
from torch import Tensor, nn

PAGE_OUT = 21  # madvise: these pages are not needed soon. What is mapped is read again when it is


def keep_in_half(network: nn.Module) -> nn.Module:
    """Store the network's weights in float16 and compute in float32, in place; returns it.

    Each layer's weights are float32 while it runs, and no longer: the network needs half the memory, and some time for
    the conversion. Weights that are float16 already are used where they lie; after each use the system is told that
    their pages are not needed soon, so that those of a mapped file take no memory.
    """
    network.requires_grad_(False)
    for layer in network.modules():
        own = list(layer.parameters(recurse=False))
        for parameter in own:
            parameter.data = parameter.data.to(torch.float16)
        if isinstance(layer, nn.Embedding):  # few of its rows are needed
            layer.register_forward_hook(lambda layer, args, output: output.float())
        elif own:
            layer.register_forward_pre_hook(_widen)
            layer.register_forward_hook(_narrow, always_call=True)
    return network


def _widen(layer: nn.Module, args: tuple) -> None:
    layer._stored = [parameter.data for parameter in layer.parameters(recurse=False)]
    for parameter, stored in zip(layer.parameters(recurse=False), layer._stored, strict=True):
        # In the order in which convolutions need no copies of their large inputs and outputs.
        layout = torch.channels_last if stored.ndim == 4 else torch.preserve_format
        parameter.data = stored.to(torch.float32, memory_format=layout)


def _narrow(layer: nn.Module, args: tuple, output: object) -> None:
    for parameter, stored in zip(layer.parameters(recurse=False), vars(layer).pop("_stored", ()), strict=False):
        parameter.data = stored
        _give_back(stored)


def _give_back(weight: Tensor) -> None:
    advise = _madvise()
    if advise is None or weight.device.type != "cpu":
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages alone
    size = (weight.data_ptr() + weight.numel() * weight.element_size() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)  # an advice: that it fails does no harm


def give_back_freed() -> None:
    """Return memory that was freed, as after loading a model, to the system (glibc keeps much of it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def _madvise() -> "ctypes._CFuncPtr | None":
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
