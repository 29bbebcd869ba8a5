"""Operations over all processes of a calibration. Each process holds the whole model and all captured activations."""

import torch.distributed as dist
from torch import Tensor

CHUNK = 2**24  # numbers summed over the processes at once


def rank() -> int:
    """Return the number of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
