"""What a UNet call consists of: operations, and shares of its time, by kind.

A kind is told by the name of the operator that was called, with all that happens within it: layout changes in a
convolution count as convolution. Matching and merging of tokens is told by operators that occur nowhere else in the
UNet, and lacks some that do, such as the division of a norm. Our kernels have names of their own, dsdiff::NAME.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell when it begins and ends

# Kind -> parts of operators' names. The first that fits counts.
KINDS = {
    "convolutions": ("conv",),
    "linear layers": ("linear", "addmm", "::mm"),
    "attention": ("attention", "softmax", "bmm"),
    "merging": ("index", "gather", "scatter", "sort", "max", "matmul", "vector_norm"),
    "elementwise": ("norm", "silu", "gelu", "geglu", "quantize", "mul", "add", "sub", "div", "round", "clamp"),
}
OTHER = "other"
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch does not count


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), OTHER)


# --- operations --------------------------------------------------------------------------------------------


def operations(call: Callable[[], Any]) -> dict[str, int]:
    """Multiplications and additions of a float UNet's call, by kind; of products alone."""
    with FlopCounterMode(display=False, custom_mapping={SDPA: _of_attention}) as counter:
        call()
    found: Counter[str] = Counter()
    for operator, count in counter.get_flop_counts().get("Global", {}).items():
        found[_kind_of_product(str(operator))] += count
    return {kind: found[kind] for kind in (*KINDS, OTHER) if found[kind]}


def _kind_of_product(operator: str) -> str:
    """In the float UNet attention is one operator, and what is left of batched products is the matching."""
    return "merging" if "bmm" in operator else kind_of(operator.replace(".", "::"))


def _of_attention(q: tuple, k: tuple, v: tuple, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# --- time --------------------------------------------------------------------------------------------------


def shares(call: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """The share of each kind in the time of all operators of a call; None where others than PyTorch compute.

    On a GPU it is the time of the kernels that they launch.
    """
    on_gpu = device.type == "cuda"
    with profile(use_device="cuda" if on_gpu else None) as found:
        call()
    seconds: Counter[str] = Counter()
    for event in found.function_events:
        if event.cpu_parent is None and event.device_type == torch.autograd.DeviceType.CPU:
            seconds[kind_of(event.name)] += event.device_time_total if on_gpu else event.cpu_time_total
    if not any(seconds[kind] for kind in KINDS):
        return None
    return {kind: seconds[kind] / seconds.total() for kind in (*KINDS, OTHER)}
