"""Compile our C kernels on first use, keep the library in the user's cache, and call it by ctypes.

Compiling takes a few seconds, once per version, compiler and kind of CPU. Without a compiler everything works, but
slower (see `fused_ops`). The environment variable CC names another compiler than the system's; CC=/bin/false switches
the kernels off. DSDIFF_MAX_CPU_ISA compiles them for an older CPU (see `cpu`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.fileio import write_atomically
from qdiff.engine import cpu
from qdiff.engine.quant_params import QuantParams

SOURCES = Path(__file__).parent / "kernels"
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120  # a compiler that takes longer is stopped

# No errno and no floating-point traps: compilers do not vectorise loops that could set them. Codes are written as
# numbers of 8 and 16 bits, and read several at a time.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"
NATIVE = ("-march=native",)
# The compiler's options for an instruction set that is capped; "" is a CPU below all of cpu.ISAS.
ARCHITECTURES = {
    "": ("-march=x86-64-v2",),
    "AVX2": ("-march=x86-64-v3",),
    "AVX2_VNNI": ("-march=x86-64-v3", "-mavxvnni"),
    "AVX512_CORE": ("-march=x86-64-v4",),
    "AVX512_CORE_VNNI": ("-march=x86-64-v4", "-mavx512vnni"),
    "AVX512_CORE_BF16": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "AVX512_CORE_AMX": (
        "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"
    ),
}  # fmt: skip
SEAL = struct.Struct("<Q32s")  # at the end of a library's file: the length of what is before it, and its SHA-256

logger = logging.getLogger(__name__)


# --- arguments of the kernels ------------------------------------------------------------------------------


class _Params(ctypes.Structure):
    """The struct QuantParams of kernels/rows.h."""

    _fields_ = (("delta", ctypes.c_float), ("zero_point", ctypes.c_float), ("high", ctypes.c_float))


class _ParamsArray:
    """The ctypes type of an argument `const QuantParams *`. It takes a sequence of QuantParams."""

    @classmethod
    def from_param(cls, value: Sequence[QuantParams]) -> ctypes.Array:
        return (_Params * len(value))(*(_Params(each.delta, each.zero_point, each.high) for each in value))


class _Data:
    """The ctypes type of a pointer to data. It takes a tensor, or None for NULL."""

    @classmethod
    def from_param(cls, value: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if value is None else value.data_ptr())


_INT, _FLOAT = ctypes.c_int64, ctypes.c_float

# Each C function: what it returns, and its arguments in the order of kernels/*.c.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # x, bfloat16, rows, width, stride, params, outputs, out
    "quantize": (None, (_Data, _INT, _INT, _INT, _INT, _ParamsArray, _INT, _Data)),
    # x, bfloat16, rows, width, weight, bias, eps, out
    "layer_norm": (None, (_Data, _INT, _INT, _INT, _Data, _Data, _FLOAT, _Data)),
    # x, bfloat16, samples, size, channels, added, groups, weight, bias, eps,
    # with_silu, params, slices, sums, lines, out
    "group_norm": (None, (
        _Data, _INT, _INT, _INT, _INT, _Data, _INT, _Data, _Data, _FLOAT,
        _INT, _ParamsArray, _INT, _Data, _Data, _Data,
    )),
    # x, bfloat16, rows, width, params, out
    "geglu": (None, (_Data, _INT, _INT, _INT, _ParamsArray, _Data)),
    # batch, targets, width
    "nearest_bytes": (_INT, (_INT, _INT, _INT)),
    # x, bfloat16, batch, tokens, width, sources, n_sources, targets, n_targets, workspace, best, partner
    "nearest": (None, (
        _Data, _INT, _INT, _INT, _INT, _Data, _INT, _Data, _INT, _Data, _Data, _Data,
    )),
    "has_attention": (_INT, ()),
    # heads, keys, width
    "attention_bytes": (_INT, (_INT, _INT, _INT)),
    # q, k, v, mask, bias, batch, heads, queries, keys, width, scale, zero_of_q, zero_of_v, softmax_delta, softmax_high,
    # params, workspace, out, floats
    "attention": (None, (
        _Data, _Data, _Data, _Data, _Data, _INT, _INT, _INT, _INT, _INT, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT,
        _ParamsArray, _Data, _Data, _Data,
    )),
    # x, bfloat16, rows, width, stride, high, symmetric, ranges, out
    "quantize_tokens": (None, (_Data, _INT, _INT, _INT, _INT, _FLOAT, _INT, _Data, _Data)),
    # x, bfloat16, samples, height, width, channels, stride, above, beside, high, symmetric, extremes, ranges, out
    "quantize_samples": (None, (
        _Data, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _INT, _Data, _Data, _Data,
    )),
    # x, bfloat16, samples, height, width, channels, gains, added, groups, weight, bias, eps,
    # with_silu, high, symmetric, above, beside, slices, sums, lines, ranges, out
    "group_norm_samples": (None, (
        _Data, _INT, _INT, _INT, _INT, _INT, _Data, _Data, _INT, _Data, _Data, _FLOAT,
        _INT, _FLOAT, _INT, _INT, _INT, _INT, _Data, _Data, _Data, _Data,
    )),
    # products, rows, width, ranges, each, sums, bias, plus, bfloat16, out
    "rescale": (None, (_Data, _INT, _INT, _Data, _INT, _Data, _Data, _Data, _INT, _Data)),
    # products, rows, width, ranges, each, sums, bias, params, out
    "rescale_to_codes": (None, (_Data, _INT, _INT, _Data, _INT, _Data, _Data, _ParamsArray, _Data)),
    # x, bfloat16, rows, width, in, sums, bias, high, symmetric, threads, row_space, ranges, out
    "geglu_tokens": (None, (
        _Data, _INT, _INT, _INT, _Data, _Data, _Data, _FLOAT, _INT, _INT, _Data, _Data, _Data,
    )),
}  # fmt: skip


# --- calling them ------------------------------------------------------------------------------------------


def call(name: str, *arguments: object) -> Any:
    """Run a kernel, with the arguments that FUNCTIONS declares; return what it returns."""
    with torch.profiler.record_function(f"dsdiff::{name}"):
        return _function(name)(*arguments)


@functools.cache
def has_attention() -> bool:
    """Return whether the library has attention for this CPU."""
    return library() is not None and bool(_function("has_attention")())


@functools.cache
def _function(name: str) -> Any:
    kernel = getattr(library(), name)
    kernel.restype, kernel.argtypes = FUNCTIONS[name]
    return kernel


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they cannot be compiled or loaded, with the reason in the log.

    They exist on Linux only: elsewhere they would load a second OpenMP beside PyTorch's.
    """
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return None
    compiler = _compiler()
    if compiler is None:
        logger.warning("no C compiler found: the integer engine works, but slower (install gcc)")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError, UnicodeError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning("no kernels, the integer engine works slower: %s", output[0] if output else error)
        return None


# --- making the library ------------------------------------------------------------------------------------


def _compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler: that in the variable CC if it is found, else the system's, else None."""
    for command in (os.environ.get("CC", ""), *COMPILERS):
        words = command.split()
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return (path, *words[1:])
    return None


def _compiled(compiler: Sequence[str]) -> Path:
    """Return the library's file, compiled unless an undamaged one is there."""
    files = sorted(SOURCES.glob("*.[ch]"))
    architecture = NATIVE if cpu.cap() is None else ARCHITECTURES[cpu.isa()]
    digest = hashlib.sha256()
    texts = (file.read_text(encoding="utf-8") for file in files)
    for part in (*compiler, *FLAGS, WIDE, *architecture, cpu.fingerprint(), *texts):
        digest.update(part.encode() + b"\0")
    path = _cache() / f"kernels-{digest.hexdigest()[:16]}.so"
    if path.exists() and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022):
        raise PermissionError(f"{path} may have been written by somebody else: remove it")
    if path.exists() and not _is_whole(path):
        logger.warning("the compiled kernels in %s are damaged: compiling them anew", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        logger.info("compiling kernels for this CPU, once")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sources = [str(file) for file in files if file.suffix == ".c"]
        write_atomically(path, lambda temporary: _make(compiler, (*architecture, *FLAGS), sources, temporary))
        path.chmod(0o700)  # whatever the umask is: files that others may write are refused above
    return path


def _make(compiler: Sequence[str], flags: Sequence[str], sources: Sequence[str], target: Path) -> None:
    """Compile the sources into a library, and seal it."""
    command = [*compiler, *flags, *sources, "-lm", "-o", str(target)]
    wide = [*compiler, WIDE, *command[len(compiler) :]]
    if _run(wide).returncode:  # not every compiler, nor every CPU, knows WIDE
        _run(command).check_returncode()
    content = target.read_bytes()
    with open(target, "ab") as file:  # loaders ignore bytes after the last section
        file.write(SEAL.pack(len(content), hashlib.sha256(content).digest()))


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)


def _is_whole(path: Path) -> bool:
    """Return whether a library has the length and the hash of its seal. Loading a truncated one kills the process."""
    content = path.read_bytes()
    library, seal = content[: -SEAL.size], content[-SEAL.size :]
    return len(seal) == SEAL.size and SEAL.unpack(seal) == (len(library), hashlib.sha256(library).digest())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsdiff"
