"""Set up the processes that torchrun started: the process group, and a device for each."""

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dsdiff.cli.console import logger
from dsdiff.environment import choose_device
from qdiff.distributed import rank

TIMEOUT = timedelta(days=7)  # one process may draw for hours alone


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes of torchrun into a process group within the block: by NCCL on GPUs, by gloo on CPUs.

    All but the first log warnings only. Nothing happens without torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # What is captured lies in main memory, what is learned on the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(_agreed_name(store, number, count), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    level = logger.level
    if rank() != 0:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


def _agreed_name(store: Store, number: int, count: int) -> str:
    """Return a name that only the processes that live now agree on.

    torchrun may keep one store through restarts. The addresses of processes that died are still in it, and a new one
    that connects to them fails. Each process says hello with a word of its own, the first one repeats all words that it
    finds, and they agree once each has found its word among these. Old words stay only until their place is taken.
    """

    def value(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    own = uuid.uuid4().hex
    store.set(f"hello/{number}", own)
    while True:
        if number == 0:
            store.set("welcome", " ".join(value(f"hello/{i}") for i in range(count)))
        welcome = value("welcome")
        if own in welcome.split():
            store.set(f"seen/{number}", welcome)
            if all(value(f"seen/{i}") == welcome for i in range(count)):
                return hashlib.sha256(welcome.encode()).hexdigest()
        time.sleep(0.02)


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
