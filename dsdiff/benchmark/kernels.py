"""Time our C kernels one by one, in turn with what they are measured against.

Attention stands beside that of PyTorch in bfloat16, the comparison of tokens beside a product in bfloat16, a tiny
decoder on integers beside itself in bfloat16. The others are memory-bound: their bytes per second stand beside those
of a copy of the same features.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.options import BenchmarkOptions
from dsdiff.benchmark.report import aligned, piped, write_text
from dsdiff.benchmark.roofline import HEADS, INPUT, best_seconds, codes
from dsdiff.benchmark.run import set_threads
from dsdiff.environment import machine
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from qdiff.engine import fused_ops, native
from qdiff.engine.backends import onednn
from qdiff.engine.decoder.tiny import IntegerTinyDecoder
from qdiff.engine.matching import nearest

ATTENTIONS = ((4096, 4096, 40), (2048, 2048, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40))
FEATURES = (2, 320, 64, 64)  # of Stable Diffusion v1's widest maps
TINY_SIDES = (256, 512, 768)  # of pictures
SIDE = 64  # of the grid whose tokens are compared, a quarter of which are destinations


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel to time. share: the bytes that it moves over those of `other`, if it is memory-bound."""

    name: str
    own: Callable[[], Any]
    other: Callable[[], Any]
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """The speed of a kernel.

    seconds: of a call. ratio: how many times as fast it is as what it is measured against or, if `of_bandwidth`, its
    share of the bandwidth of a copy.
    """

    name: str
    seconds: Spread
    ratio: Spread
    of_bandwidth: bool


def benchmark(options: BenchmarkOptions) -> list[KernelFigures]:
    """Time the kernels; raises ValueError where there are none."""
    set_threads(options.threads, torch.device("cpu"))
    if not native.has_attention():
        raise ValueError("there are no kernels of ours here: they need a C compiler, Linux, and a CPU with AVX2")
    figures = []
    with torch.no_grad():
        for case in tqdm([*_attentions(), _nearest(), *_tiny_decoders(), *_memory_bound()], "timing", unit="kernel"):
            for call in (case.own, case.other):  # once, untimed
                call()
            pairs = [
                (best_seconds(case.own, options.seconds), best_seconds(case.other, options.seconds))
                for _ in range(options.repeats)
            ]
            figures.append(
                KernelFigures(
                    name=case.name,
                    seconds=Spread.over([own for own, _ in pairs]),
                    ratio=Spread.over([other / own * (case.share or 1) for own, other in pairs]),
                    of_bandwidth=case.share is not None,
                )
            )
    return figures


def _attentions() -> list[Case]:
    cases = []
    for queries, keys, width in ATTENTIONS:
        own = (codes(2, queries, HEADS * width), codes(2, keys, HEADS * width), codes(2, keys, HEADS * width))
        q, k, v = (torch.randn(2, HEADS, n, width).bfloat16() for n in (queries, keys, keys))
        cases.append(
            Case(
                name=f"attention, {queries} queries, {keys} keys, {HEADS} heads of {width}",
                own=lambda own=own: fused_ops.attention(own, (INPUT, INPUT, INPUT), HEADS, INPUT, torch.bfloat16),
                other=lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            )
        )
    return cases


def _nearest() -> Case:
    x = torch.randn(2, SIDE**2, FEATURES[1]).bfloat16()
    places = torch.randperm(SIDE**2)
    targets, sources = places.split([SIDE**2 // 4, SIDE**2 * 3 // 4])

    def product() -> Tensor:
        unit = F.normalize(x, dim=-1)
        return (unit[:, sources] @ unit[:, targets].mT).max(dim=-1).indices

    return Case(name=f"nearest of {len(targets)} tokens", own=lambda: nearest(x, sources, targets), other=product)


def _tiny_decoders() -> list[Case]:
    """Return a tiny decoder of TAESD's sizes on integers, beside it in bfloat16, for pictures of several sizes."""
    if onednn.largest_exact_weight() < onednn.LARGEST:
        return []
    floats = TinyDecoder().requires_grad_(False).bfloat16().to(memory_format=torch.channels_last)
    integers, cases = IntegerTinyDecoder(floats, torch.bfloat16), []
    for side in TINY_SIDES:
        z = torch.randn(1, 4, side // 8, side // 8).bfloat16().contiguous(memory_format=torch.channels_last)
        cases.append(Case(name=f"tiny decoder, {side}x{side}", own=partial(integers, z), other=partial(floats, z)))
    return cases


def _memory_bound() -> list[Case]:
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(FEATURES).to(dtype).contiguous(memory_format=torch.channels_last)
        tokens, target = x.permute(0, 2, 3, 1).flatten(1, 2), torch.empty_like(x)
        group, layer, added = nn.GroupNorm(32, FEATURES[1]), nn.LayerNorm(FEATURES[1]), torch.randn(FEATURES[:2])
        read, size = x.nbytes, x.numel()
        work = {  # name -> call, bytes
            "quantize": (lambda x=x: fused_ops.quantize(x, INPUT), read + size),
            "group norm + SiLU": (
                lambda x=x, norm=group, added=added: fused_ops.group_norm(norm, x, INPUT, added=added, silu=True),
                2 * read + size,
            ),
            "layer norm": (lambda x=tokens, norm=layer: fused_ops.layer_norm(norm, x), 2 * read),
            "GEGLU": (lambda x=tokens: fused_ops.geglu(x, INPUT), read + size // 2),
        }
        for name, (call, count) in work.items():
            kind = str(dtype).removeprefix("torch.")
            copy = lambda target=target, x=x: target.copy_(x)  # noqa: E731
            cases.append(Case(name=f"{name}, {kind}", own=call, other=copy, share=count / (2 * read)))
    return cases


# --- report ------------------------------------------------------------------------------------------------


def write(figures: Sequence[KernelFigures], outdir: Path) -> None:
    """Write kernels.json and kernels.md."""
    outdir.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(torch.device("cpu")), "kernels": [asdict(each) for each in figures]}
    write_text(outdir / "kernels.json", json.dumps(facts, indent=2) + "\n")
    write_text(outdir / "kernels.md", f"{_heading()}\n\n{piped(_table(figures))}\n")


def text(figures: Sequence[KernelFigures]) -> str:
    """Return the table for a terminal."""
    return "\n".join([_heading(), "", *aligned(_table(figures))])


def _heading() -> str:
    facts = machine(torch.device("cpu"))
    return (
        f"{facts['cpu']} ({facts['isa']}), {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}; "
        "medians (least..most), beside PyTorch in bfloat16 or a copy of the same features."
    )


def _table(figures: Sequence[KernelFigures]) -> list[list[str]]:
    lines = [["kernel", "ms", "times PyTorch", "of a copy's bandwidth"]]
    for each in figures:
        ratio = each.ratio
        if each.of_bandwidth:
            cells = ["-", f"{ratio.median:.0%} ({ratio.min:.0%}..{ratio.max:.0%})"]
        else:
            cells = [f"{ratio.median:.3g} ({ratio.min:.3g}..{ratio.max:.3g})", "-"]
        lines.append([each.name, f"{1e3 * each.seconds.median:.3g}", *cells])
    return lines
