"""Operations over all processes that share work. Each process holds the whole model."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.fileio import only_run_in

CHUNK = 2**24  # numbers summed over the processes at once
PATIENCE = 20  # seconds that a restarted process waits for the one before it to be gone
Item = TypeVar("Item")


def rank() -> int:
    """Return the number of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_share(work: Sequence[Item]) -> Sequence[Item]:
    """Return the part of a list of work that this process does: every world_size-th item, from the rank-th on."""
    return work[rank() :: world_size()]


def restarted() -> bool:
    """Return True if torchrun started the processes anew after one of them died (--max-restarts). All call this.

    On many machines only that of the dead process counts the restart.
    """
    counts = torch.tensor([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))])
    sum_over_ranks([counts])
    return bool(counts.item())


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        for chunk in tensor.view(-1).split(CHUNK):
            dist.all_reduce(chunk)


def from_first_rank(tensors: list[Tensor]) -> None:
    """Replace each tensor by that of the first process, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until all processes have come to this call."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def only_work_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder within the block, see `only_run_in`. All processes call this.

    The first process locks the folder for all, and the others wait for it. It frees the folder when all have come to
    the end of the block. Restarted processes give those before them PATIENCE seconds to end.
    Raises ValueError in all processes if another run is in the folder, or if it cannot be made.
    """
    patience = PATIENCE if restarted() else 0
    with ExitStack() as stack:
        reason = None
        if rank() == 0:
            try:
                _enter(stack, folder, patience)
            except (ValueError, OSError) as error:
                if world_size() == 1:
                    raise
                reason = str(error)
        if world_size() > 1:
            said = [reason]
            dist.broadcast_object_list(said, src=0)
            if said[0] is not None:
                raise ValueError(said[0])
        yield
        barrier()


def _enter(stack: ExitStack, folder: str | Path, patience: float) -> None:
    """Lock the folder until the stack ends. patience: seconds to wait for another run to end."""
    end = time.monotonic() + patience
    while True:
        try:
            return stack.enter_context(only_run_in(folder))
        except ValueError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.5)
