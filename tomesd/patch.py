"""Switch token merging on and off in any diffusion model, ours or a third party's.

Nothing of the model is re-implemented and no class is changed: hooks do the work (tomesd.hooks). A patched block
carries them as its attribute `token_merging`. Names of modules and of the state dict stay what they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn

from .hooks import ATTRIBUTE, BlockMerging
from .merge import Nearest
from .network import BLOCK_CLASS, blocks_of, check_block, network_of
from .options import MergeOptions, check_seed
from .state import ModelMerging, TokenCount, Walk


def apply_patch(
    model: Any,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    *,
    seed: int = 0,
    nearest: Nearest | None = None,
    proportional: bool = False,
    merge_kv: bool = False,
    merge_schedule: str | None = None,
    merge_levels: str | None = None,
    merge_every: int = 1,
    merge_share: bool = False,
) -> Any:
    """Switch token merging on in the model, in place, and return the model. A former patch is replaced.

    model: a LatentDiffusion, a UNet, a quantized UNet, a diffusers UNet, or a diffusers pipeline with a `unet`.
        Quantize first and patch last. The blocks are found by class name, so that subclasses count as well.
    nearest: compares tokens in place of PyTorch; see `tomesd.merge.match_tokens`.
    The other arguments are those of MergeOptions; with `merge_schedule` or `merge_every` the model runs within `walk`.
    Destinations are drawn from a generator that belongs to the patch and starts from `seed` (a CPU generator, so that a
    seed means the same on every device); the global generator is neither read nor advanced.
    Raises ValueError, and leaves the model as it is, if an option is out of range or no block is found.
    """
    options = MergeOptions(
        ratio=ratio,
        max_downsample=max_downsample,
        sx=sx,
        sy=sy,
        use_rand=use_rand,
        merge_attn=merge_attn,
        merge_crossattn=merge_crossattn,
        merge_mlp=merge_mlp,
        seed=seed,
        proportional=proportional,
        merge_kv=merge_kv,
        merge_schedule=merge_schedule,
        merge_levels=merge_levels,
        merge_every=merge_every,
        merge_share=merge_share,
    )
    network = network_of(model)
    blocks = blocks_of(network)
    if not blocks:
        raise ValueError(
            f"no {BLOCK_CLASS} found in {type(model).__name__}: pass a UNet with transformer blocks, "
            "or a model or pipeline that holds one"
        )
    for name, block in blocks.items():
        check_block(name, block, options)
    remove_patch(model)
    shared = ModelMerging(options, network, nearest)
    for name, block in blocks.items():
        setattr(block, ATTRIBUTE, BlockMerging(name, block, shared))
    return model


def remove_patch(model: Any) -> Any:
    """Undo apply_patch, in place, and return the model; its hooks and outputs are what they were before.

    A model without a patch is left as it is.
    """
    for block in blocks_of(network_of(model)).values():
        merging = _merging_of(block)
        if merging is not None:
            merging.remove()
            delattr(block, ATTRIBUTE)
    return model


def reseed(model: Any, seed: int) -> None:
    """Restart the draw of destinations from `seed`, as apply_patch(..., seed=seed) would.

    Raises ValueError if the model is not patched or the seed is not in [0, 2**63).
    """
    check_seed(seed)
    for shared in _shared(_mergings(model)):
        shared.reseed(seed)


@contextmanager
def walk(model: Any, calls: int) -> Iterator[None]:
    """Let the calls of the model within the block be the steps of a picture, or of a batch of them.

    calls: how many there will be, 1 or more. A `merge_schedule` gives each its ratio, and calls beyond them that of the
    last one; matchings are kept as `merge_every` says, within the block alone. Other options are not concerned.
    Raises ValueError if the model is not patched, or for a number of calls below 1.
    """
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise ValueError(f"calls is {calls!r}: it must be a whole number of 1 or more")
    before = [(shared, shared.walk) for shared in _shared(_mergings(model))]
    try:
        for shared, _ in before:
            shared.walk = Walk(calls=calls)
        yield
    finally:
        for shared, outer in before:
            shared.walk = outer


@contextmanager
def pinned(model: Any, seed: int) -> Iterator[None]:
    """Let each transformer block draw its destinations once within the block, from `seed`, and keep them.

    All forwards then merge the same tokens, whatever their batches (odd ones too), and whether the whole model, a part
    of it, or one transformer block runs. Reconstruction needs this, so that inputs and targets match.
    Raises ValueError if the model is not patched, if the seed is not in [0, 2**63), and for options by which what a
    block merges depends on the step or on other blocks.
    """
    check_seed(seed)
    mergings = _mergings(model)
    if any(shared.options.follows_others for shared in _shared(mergings)):
        raise ValueError("a block by itself cannot merge by merge_schedule, merge_every or merge_share: leave them out")
    try:
        for shared in _shared(mergings):
            shared.reseed(seed)
            shared.pinned = True
        for merging in mergings:
            merging.drawn = None
        yield
    finally:
        for shared in _shared(mergings):
            shared.pinned = False
        for merging in mergings:
            merging.drawn = None


def token_report(model: Any) -> list[TokenCount]:
    """Return how many tokens each patched block got and processed in its last forward, in the order of the model.

    Raises ValueError if the model is not patched.
    """
    return [merging.count for merging in _mergings(model)]


def _merging_of(block: nn.Module) -> BlockMerging | None:
    return vars(block).get(ATTRIBUTE)


def _mergings(model: Any) -> list[BlockMerging]:
    found = [_merging_of(block) for block in blocks_of(network_of(model)).values()]
    mergings = [merging for merging in found if merging is not None]
    if not mergings:
        raise ValueError(f"{type(model).__name__} has no merged tokens: call tomesd.apply_patch first")
    return mergings


def _shared(mergings: list[BlockMerging]) -> list[ModelMerging]:
    """Return the distinct shared states of the blocks: one, unless a block comes from another patched model."""
    return list(dict.fromkeys(merging.model for merging in mergings))
