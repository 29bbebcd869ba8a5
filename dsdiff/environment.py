"""Facts about where a computation runs: versions, device, precision, machine, memory."""

import os
import platform
import sys
import tomllib
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import torch

from dsdiff.models.registry import ROOT
from qdiff.engine import cpu


def versions() -> dict[str, str]:
    """Return the versions of the project, of Python, and of the packages on which pictures depend."""
    packages = {"torch": str(torch.__version__), "tokenizers": metadata.version("tokenizers")}
    return {"dsdiff": project_version(), "python": platform.python_version(), **packages}


def project_version() -> str:
    """Return the version in pyproject.toml of this checkout, or that of the installed package."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        return tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"]
    return metadata.version("dsdiff")


def choose_device(name: str) -> torch.device:
    """Return the device of a name: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Raises ValueError for any other name, and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, index = name.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdecimal())):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ValueError(f"device {name!r} is not there ({count} CUDA devices): use another one or --device cpu")
    return torch.device(name)


def precision_context(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context in which networks compute in a precision.

    autocast: bfloat16, or float16 on a GPU that has none. full: float32, not rounded to TF32 on the way.
    """
    if precision == "full":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16 if has_bfloat16 else torch.float16)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """Return the kind of this machine: CPU, cores, versions. The facts are the same on all machines of one kind."""
    kind = {
        "cpu": cpu.model_name(),
        "isa": cpu.isa(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
    }
    return kind | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process held; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
