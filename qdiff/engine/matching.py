"""Compare tokens in whole numbers, for token merging."""

import torch
from torch import Tensor

from qdiff.engine import native

MAX_WIDTH = 2048  # the kernel's limit


def nearest(x: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the most similar target of each source; None where our kernel cannot run.

    x: tokens [B, N, C], float32 or bfloat16, on the CPU. sources [S], targets [D]: places of tokens, int64.
    The results are the cosine similarities, float32 [B, S], and the targets as places in `targets`, int64 [B, S], the
    first of equals. A zero vector has a similarity of 0 to all. Tokens are rounded to 8 bits, each in a range of its
    own, which moves similarities of wide tokens by about 0.001; those of bfloat16 products have steps of 0.004.
    """
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] <= MAX_WIDTH
    if not known or min(x.numel(), len(sources), len(targets)) == 0 or native.library() is None:
        return None
    (batch, tokens, width), x = x.shape, x.contiguous()
    size = native.call("nearest_bytes", batch, len(targets), width)
    if size == 0:
        return None
    best = torch.empty(batch, len(sources))
    partner = torch.empty(batch, len(sources), dtype=torch.int64)
    native.call(
        "nearest", x, x.dtype == torch.bfloat16, batch, tokens, width, sources, len(sources), targets, len(targets),
        torch.empty(size, dtype=torch.uint8), best, partner
    )  # fmt: skip
    return best, partner
