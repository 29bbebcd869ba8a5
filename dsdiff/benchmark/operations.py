"""Count the operations of a UNet call, and split its time, by kind of operator.

The kind follows from the name of the operator that was called, and covers all that happens within it: layout changes
inside a convolution count as convolution. Merging of tokens is recognized by operators that occur nowhere else in the
UNet; those that do, such as divisions, count as elementwise. Our kernels have names of their own, dsdiff::NAME.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from printing when it begins and ends

# Kind -> parts of operators' names. The first kind that fits counts.
KINDS = {
    "convolutions": ("conv",),
    "linear layers": ("linear", "addmm", "::mm"),
    "attention": ("attention", "softmax", "bmm"),
    "merging": ("index", "gather", "scatter", "sort", "max", "matmul", "vector_norm"),
    "elementwise": ("norm", "silu", "gelu", "geglu", "quantize", "mul", "add", "sub", "div", "round", "clamp"),
}
OTHER = "other"
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch's counter does not know it


def kind_of(operator: str) -> str:
    """Return the kind of an operator by its name, such as "aten::conv2d"."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), OTHER)


# --- operations --------------------------------------------------------------------------------------------


def operations(call: Callable[[], Any]) -> dict[str, int]:
    """Return the multiplications and additions of a float UNet's call, by kind.

    Only matrix products, convolutions and attention are counted.
    """
    with FlopCounterMode(display=False, custom_mapping={SDPA: _attention_operations}) as counter:
        call()
    found: Counter[str] = Counter()
    for operator, count in counter.get_flop_counts().get("Global", {}).items():
        found[_kind_of_product(str(operator))] += count
    return {kind: found[kind] for kind in (*KINDS, OTHER) if found[kind]}


def _kind_of_product(operator: str) -> str:
    """Return the kind of a counted operator. The float UNet's attention is one operator, so that the other batched
    products are those that match tokens."""
    return "merging" if "bmm" in operator else kind_of(operator.replace(".", "::"))


def _attention_operations(q: tuple, k: tuple, v: tuple, *args: Any, **kwargs: Any) -> int:
    """Return the operations of attention, from the shapes of q, k and v."""
    return sdpa_flop_count(q, k, v)


# --- time --------------------------------------------------------------------------------------------------


def shares(call: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Return each kind's share of the time of all operators; None where another library than PyTorch computes.

    On a GPU the time is that of the kernels that the operators launch.
    """
    on_gpu = device.type == "cuda"
    with profile(use_device="cuda" if on_gpu else None) as found:
        call()
    seconds: Counter[str] = Counter()
    assert found is not None and found.function_events is not None
    for event in found.function_events:
        if event.cpu_parent is None and event.device_type.name == "CPU":
            seconds[kind_of(event.name)] += event.device_time_total if on_gpu else event.cpu_time_total
    if not any(seconds[kind] for kind in KINDS):
        return None
    return {kind: seconds[kind] / seconds.total() for kind in (*KINDS, OTHER)}
