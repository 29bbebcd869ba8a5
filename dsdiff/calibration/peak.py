"""The memory that tensors take at most within a block: exact, whatever else the process and its allocator hold."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, and have not been freed: the most at a time.

    Buffers that an operation takes and gives back within itself are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known = WeakIdKeyDictionary()  # the storages seen; those of before count nothing

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._known[storage] = True
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = True
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


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
