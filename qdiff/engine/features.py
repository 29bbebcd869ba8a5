"""Features as our kernels see them, and what PyTorch computes in the place of kernels."""

import functools
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.engine import native
from qdiff.engine.quant_params import Params

SLICE = 256  # pixels of a feature map whose sums one thread computes in a group norm


def has_kernel(x: Tensor, norm: nn.LayerNorm | nn.GroupNorm | None = None) -> bool:
    """Return whether our kernels can read x, and the weights of the norm."""
    if norm is not None and (norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32):
        return False
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and not (torch.is_grad_enabled() and x.requires_grad) and native.library() is not None


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Return whether our Triton kernels run on this device: a GPU of the generation of the A100, or a later one."""
    known = device.type == "cuda" and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


def gpu_kernels(x: Tensor, norm: nn.LayerNorm | nn.GroupNorm | None = None) -> ModuleType | None:
    """Return the module of our elementwise Triton kernels if they can read x, and the weights of the norm."""
    if norm is not None and (norm.weight is None or norm.bias is None):
        return None
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0
    if not known or not has_triton(x.device) or (torch.is_grad_enabled() and x.requires_grad):
        return None
    from qdiff.engine.backends import triton_elementwise  # imports Triton, which takes a second

    return triton_elementwise


def on_device(x: Tensor) -> AbstractContextManager:
    """Return a context in which kernels are launched on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def evenly_spaced(x: Tensor) -> tuple[int, int, int] | None:
    """Return the number of rows of x, their width, and the distance from one to the next; None if that varies."""
    x = channels_at_the_end(x)
    width = x.shape[-1]
    if x.numel() == 0 or (width > 1 and x.stride(-1) != 1):
        return None
    sizes = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    for (_, outer), (n, inner) in pairwise(sizes):
        if outer != n * inner:
            return None
    return x.numel() // width, width, sizes[-1][1] if sizes else width


def channels_at_the_end(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def group_norm_by_torch(norm: nn.GroupNorm, x: Tensor, added: Tensor | None, silu: bool) -> Tensor:
    """Return norm(x + added), or SiLU of it; see `fused_ops.group_norm`."""
    if added is not None:
        x = x + added.to(x.dtype).reshape(*added.shape, *[1] * (x.ndim - 2))
    y = norm(x) if x.dtype == torch.float32 else in_float32(norm, x)
    return F.silu(y) if silu else y


def in_float32(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    """Return norm(x) in float32, whatever the dtype of x and of the norm's weights."""
    weight, bias = (None if each is None else each.float() for each in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def as_bytes(codes: Tensor, params: Params) -> Tensor:
    """Return whole numbers in 0..params.high as uint8, two tensors for wide codes."""
    if not params.is_wide:
        return codes.to(torch.uint8)
    whole = codes.to(torch.int32)
    return torch.stack([whole & 255, whole >> 8]).to(torch.uint8)


def empty_codes(shape: Sequence[int], params: Params) -> Tensor:
    """Return an uninitialised tensor for codes of `shape`, whose last dimension has the channels."""
    return torch.empty(*([2] if params.is_wide else []), *shape, dtype=torch.uint8)
