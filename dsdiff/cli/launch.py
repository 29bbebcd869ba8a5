"""Set up the processes that torchrun started: the process group, and a device for each."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dsdiff.cli.console import logger
from dsdiff.environment import choose_device
from qdiff.distributed import rank


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes of torchrun into a process group within the block: by NCCL on GPUs, by gloo on CPUs.

    All but the first log warnings only, until `logs` ends. Nothing happens without torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # What is captured lies in main memory, what is learned on the device. One process may draw for hours alone.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    if rank() != 0:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """Return the device of this process, see `choose_device`: under torchrun on GPUs, one each."""
    device = choose_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"process {number + 1} has no GPU: there are {count}; start fewer, or use --device cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device
