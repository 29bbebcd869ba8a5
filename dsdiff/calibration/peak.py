"""The memory that tensors take at most within a block: exact, whatever else the process and its allocator hold."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, and have not been freed: the most at a time.

    Buffers that an operation takes and gives back within itself are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._counted: dict[int, weakref.ref] = {}  # by the address of the storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for storage in _storages((result,)):
            address = storage._cdata
            if address not in self._counted and all(each._cdata != address for each in _inputs(args, kwargs)):
                self._count(storage, address)
        return result

    def _count(self, storage: UntypedStorage, address: int) -> None:
        size = storage.nbytes()
        self._counted[address] = weakref.ref(storage, partial(self._uncount, address, size))
        self.held += size
        self.most = max(self.most, self.held)

    def _uncount(self, address: int, size: int, _: weakref.ref) -> None:
        del self._counted[address]
        self.held -= size


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[UntypedStorage]:
    """Yield the storages of which a result may be a view, though they were made before."""
    yield from _storages(args)
    yield from _storages(kwargs.values())


def _storages(values: Iterable[Any]) -> Iterator[UntypedStorage]:
    # torch.utils._pytree does the same for any structure; here are hundreds of thousands of calls.
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, tuple | list):
            yield from _storages(value)


class GpuPeak:
    """The same for a GPU, by its allocator."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    @property
    def most(self) -> int:
        """Bytes at most since this object was made."""
        return torch.cuda.max_memory_allocated(self.device) - self.before


@contextmanager
def peak_memory(device: torch.device) -> Iterator[TensorPeak | GpuPeak]:
    """Yield an object whose `most` is the bytes that tensors on `device` take at most within the block."""
    if device.type == "cuda":
        yield GpuPeak(device)
        return
    with TensorPeak() as peak:
        yield peak
