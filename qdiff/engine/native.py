"""Our kernels in C: compiled on first use by the system's compiler, kept in the user's cache, called by ctypes.

It takes a few seconds, once a version and kind of CPU. Without a compiler all works, slower: see `fused_ops`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.fileio import write_atomically

SOURCES = Path(__file__).parent / "kernels"
# Vectors of 512 bits where there are any; no errno and no floating point traps, for which loops would stay scalar.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"
COMPILE_SECONDS = 120  # after which a compiler is given up

logger = logging.getLogger(__name__)


class Range(ctypes.Structure):
    """How a number becomes a code."""

    _fields_ = (("delta", ctypes.c_float), ("zero_point", ctypes.c_float), ("high", ctypes.c_float))


def ranges(of: Sequence) -> ctypes.Array:
    """Of things with delta, zero_point and high."""
    return (Range * len(of))(*(Range(one.delta, one.zero_point, one.high) for one in of))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, with a line in the log if they should be there."""
    if sys.platform == "darwin" or not torch.backends.openmp.is_available():  # whose OpenMP would be a second one
        return None
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        logger.warning("no C compiler found: the integer engine works, but slower (install gcc)")
        return None
    try:
        path = _compiled(compiler)
    except (OSError, RuntimeError, UnicodeError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning("kernels do not compile, the integer engine works slower: %s", output[0] if output else error)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # damaged, maybe: the next run makes it anew
        logger.warning("kernels cannot be loaded, the integer engine works slower: %s", error)
        return None


@functools.cache
def has_attention() -> bool:
    """Whether the library has attention for this CPU."""
    return library() is not None and bool(library().has_attention())


def attention_bytes(heads: int, keys: int, width: int) -> int:
    """Of the workspace that attention needs."""
    library().attention_bytes.restype = ctypes.c_int64
    return library().attention_bytes(*map(ctypes.c_int64, (heads, keys, width)))


def _compiled(compiler: str) -> Path:
    """The library's file, made if it is not there."""
    files = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256()
    for part in (compiler, *FLAGS, WIDE, _cpu(), *(file.read_text(encoding="utf-8") for file in files)):
        digest.update(part.encode() + b"\0")
    path = _cache() / f"kernels-{digest.hexdigest()[:16]}.so"
    if path.exists() and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022):
        raise PermissionError(f"{path} may have been written by somebody else: remove it")
    if not path.exists():
        logger.info("compiling kernels for this CPU, once")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sources = [str(file) for file in files if file.suffix == ".c"]
        write_atomically(path, lambda temporary: _compile(compiler, sources, temporary))
    return path


def _compile(compiler: str, sources: Sequence[str], target: Path) -> None:
    command = [compiler, *FLAGS, *sources, "-lm", "-o", str(target)]
    wide = [*command[:1], WIDE, *command[1:]]
    options = {"capture_output": True, "text": True, "timeout": COMPILE_SECONDS}
    if subprocess.run(wide, **options).returncode:  # a compiler, or a CPU, without that option
        subprocess.run(command, check=True, **options)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsdiff"


def _cpu() -> str:
    """What tells CPUs apart that need other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(name: str, *arguments: object) -> None:
    """Run a kernel of the library. Whole numbers are passed as 64 bits, floats as 32, tensors by their address."""
    kernel = getattr(library(), name)
    kernel.restype = None
    with torch.profiler.record_function(f"dsdiff::{name}"):
        kernel(*(_argument(value) for value in arguments))


def _argument(value: object) -> object:
    if isinstance(value, Tensor) or value is None:
        return pointer(value)
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else value
