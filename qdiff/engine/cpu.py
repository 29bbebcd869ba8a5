"""Query the CPU: its instruction set, whether it computes in bfloat16, its name.

The instruction sets are those of oneDNN that matter to integer kernels, under oneDNN's names. The environment variable
DSDIFF_MAX_CPU_ISA caps them, as ONEDNN_MAX_CPU_ISA caps oneDNN; where only the latter is set, it caps both. So a kernel
for an older CPU can be tried on a newer one.
"""

import functools
import os
import platform
from pathlib import Path

import torch

CAPS = ("DSDIFF_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")  # the first that is set counts

_AVX2 = frozenset({"avx2", "fma3"})
_AVX512 = _AVX2 | {"avx512_f", "avx512_cd", "avx512_bw", "avx512_dq", "avx512_vl"}
_BF16 = _AVX512 | {"avx512_vnni", "avx512_bf16"}

# What each instruction set needs, by PyTorch's names of the features; the later ones are preferred.
ISAS = {
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2 | {"avx_vnni"},
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _AVX512 | {"avx512_vnni"},
    "AVX512_CORE_BF16": _BF16,
    "AVX512_CORE_AMX": _BF16 | {"amx_tile", "amx_int8", "amx_bf16"},
}
_EVERYTHING = frozenset[str]().union(*ISAS.values())

# What each cap of oneDNN allows; from AVX512_CORE_FP16 on, oneDNN adds AVX-VNNI. Names that are not ours count as the
# nearest one below.
ALLOWED = {
    **ISAS,
    "SSE41": frozenset[str](),
    "AVX": frozenset[str](),
    "AVX2_VNNI_2": ISAS["AVX2_VNNI"],
    **dict.fromkeys(("AVX512_CORE_FP16", "AVX10_1_512"), _BF16 | {"avx_vnni"}),
    **dict.fromkeys(("AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX"), _EVERYTHING),
    **dict.fromkeys(("AVX10_1_512_AMX_FP16", "AVX10_2", "AVX10_2_512", "AVX10_2_AMX_2"), _EVERYTHING),
    **dict.fromkeys(("AVX10_2_512_AMX_2", "ALL", "DEFAULT"), _EVERYTHING),
}

# PyTorch's names of features -> those of Linux, where they differ by more than the underscore behind avx512.
_LINUX_NAMES = {"fma3": "fma", **{name: name.replace("avx512_", "avx512") for name in _AVX512 - _AVX2}}


def cap() -> str | None:
    """Return the name that caps the instruction set, None where nothing does. Raises ValueError for unknown names."""
    for variable in CAPS:
        name = os.environ.get(variable, "").strip().upper()
        if name and name not in ALLOWED:
            raise ValueError(f"{variable} is {os.environ[variable]!r}: it must be one of {', '.join(ALLOWED)}")
        if name:
            return name
    return None


def isa() -> str:
    """Return the best of ISAS that this CPU has and the cap allows; "" where there is none, as on other processors."""
    limit = cap()
    usable = features() if limit is None else features() & ALLOWED[limit]
    return next((name for name in reversed(ISAS) if ISAS[name] <= usable), "")


def has_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16 by itself, under the cap."""
    return isa() in ("AVX512_CORE_BF16", "AVX512_CORE_AMX")


def model_name() -> str:
    """Return the CPU's name, for reports."""
    return (
        _linux_facts().get("model name")
        or str(getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", ""))
        or platform.processor()
        or platform.machine()
    )


def fingerprint() -> str:
    """Return a text that differs between CPUs for which a compiler makes different code."""
    facts = _linux_facts()
    flags = facts.get("flags") or facts.get("Features") or " ".join(sorted(features()))
    return " ".join((platform.machine(), model_name(), flags))


@functools.cache
def features() -> frozenset[str]:
    """Return those features of ISAS that this CPU has, whatever the cap is."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return frozenset(name for name in _EVERYTHING if capabilities.get(name))
    flags = _linux_facts().get("flags", "").split()
    if flags:
        return frozenset(name for name in _EVERYTHING if _LINUX_NAMES.get(name, name) in flags)
    # An older PyTorch on another system says publicly only this much. VNNI and bfloat16 are then not used.
    known = {"AVX2": ISAS["AVX2"], "AVX512": ISAS["AVX512_CORE"]}
    return known.get(torch.backends.cpu.get_cpu_capability(), frozenset())


@functools.cache
def _linux_facts() -> dict[str, str]:
    """Return what Linux says of the first processor; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
