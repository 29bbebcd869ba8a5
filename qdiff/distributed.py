"""Several processes as one: each holds the whole model and all captured activations, and does its share of the work."""

import torch.distributed as dist
from torch import Tensor

CHUNK = 2**24  # numbers summed over the processes at once


def rank() -> int:
    """This process's number, 0 without others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        for chunk in tensor.view(-1).split(CHUNK):
            dist.all_reduce(chunk)


def from_first_rank(tensors: list[Tensor]) -> None:
    """Replace each tensor by the first process's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()
