"""Switching token merging on and off in a diffusion model, whoever wrote it.

Nothing of the model is re-implemented. A patched block is of a subclass of its own class that matches its tokens
before it does its work; hooks on its attention and feed-forward layers then merge what goes in and unmerge what
comes out. The layers between them (norms, residuals, and whatever else the block has) see all tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn as nn

from .merge import Matching, choose_destinations, match_tokens

BLOCK_CLASS = "BasicTransformerBlock"
# Where a pipeline, a LatentDiffusion, its wrapper or a quantized model keeps the network inside it.
INNER_NAMES = ("unet", "diffusion_model", "model")
DOWNSAMPLES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to merge.

    ratio: the part of the tokens to merge away, in [0, 1 - 1 / (sx * sy)]. Up to 0.5 is wise, 0.75 is visible.
    max_downsample: merge only in blocks that see the latents at 1/max_downsample of their size or larger:
        1, 2, 4 or 8. 1 has most of the gain; 2 is wise for large pictures.
    sx, sy: width and height of the tiles that keep one token (the destination) each. A tile larger than the
        grid is clipped to it.
    use_rand: draw the destination of a tile, instead of taking its first token. Not done when the batch is
        odd, since then it may hold a conditional sample without its unconditional one, or the reverse.
    merge_attn, merge_crossattn, merge_mlp: merge around self-attention (most of the gain), around
        cross-attention, around the feed-forward layer (both cost more quality than they gain).
    seed: of the model's own generator of destinations, in [0, 2**63).
    Raises ValueError for anything else.
    """

    ratio: float = 0.5
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("sx", "sy"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, 1 or more")
        limit = 1 - 1 / (self.sx * self.sy)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= limit:
            raise ValueError(
                f"ratio is {self.ratio!r}: with tiles of {self.sx} x {self.sy} it must lie in [0, {limit:g}]; "
                "larger tiles allow more"
            )
        if not _is_int(self.max_downsample) or self.max_downsample not in DOWNSAMPLES:
            raise ValueError(f"max_downsample is {self.max_downsample!r}: it must be 1, 2, 4 or 8")
        for name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("nothing to merge: switch on merge_attn, merge_crossattn or merge_mlp")
        _check_seed(self.seed)

    def layers(self) -> tuple[str, ...]:
        """The names of a block's layers around which tokens are merged."""
        wanted = {"attn1": self.merge_attn, "attn2": self.merge_crossattn, "ff": self.merge_mlp}
        return tuple(name for name, on in wanted.items() if on)


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """What a block did in its last forward; zeros before the first.

    name: the block's name within the diffusion model. tokens_in: tokens it was given, per sample.
    tokens_processed: tokens that its merged layers worked on.
    """

    name: str
    tokens_in: int
    tokens_processed: int


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
) -> Any:
    """Switches token merging on in the model, in place, and returns the model. A former patch is replaced.

    model: a LatentDiffusion, a UNet, a quantized UNet, a diffusers UNet, or a diffusers pipeline with a `unet`.
        Quantize first and patch last. The blocks are found by class name, so that subclasses count as well.
    The other arguments are those of MergeOptions. Destinations are drawn from a generator that belongs to the
    patch and starts from `seed` (a CPU generator, so that a seed means the same on every device); the global
    generator is neither read nor advanced.
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
    )
    network = _network_of(model)
    blocks = _blocks_of(network)
    if not blocks:
        raise ValueError(
            f"no {BLOCK_CLASS} found in {type(model).__name__}: pass a UNet with transformer blocks, "
            "or a model or pipeline that holds one"
        )
    for name, block in blocks.items():
        _check_block(name, block)
    remove_patch(model)
    state = _ModelState(options, network)
    for name, block in blocks.items():
        _patch_block(name, block, state)
    return model


def remove_patch(model: Any) -> Any:
    """Undoes apply_patch, in place, and returns the model; classes, hooks and outputs are what they were before.

    A model without a patch is left as it is.
    """
    for block in _blocks_of(_network_of(model)).values():
        if _is_patched(block):
            block._tome.state.hook.remove()
            _restore_block(block)
    return model


def reseed(model: Any, seed: int) -> None:
    """Restarts the draw of destinations from `seed`, as apply_patch(..., seed=seed) would.

    Raises ValueError if the model is not patched or the seed is not in [0, 2**63).
    """
    _check_seed(seed)
    for state in {id(block._tome.state): block._tome.state for block in _patched_blocks(model)}.values():
        state.reseed(seed)


@contextmanager
def pinned(model: Any, seed: int) -> Iterator[None]:
    """Within the block each transformer block draws its destinations once, from `seed`, and keeps them.

    So all forwards merge the same tokens of a tile, whatever their batches (odd ones too), and whether the whole
    model runs, a part of it, or a block alone: what a reconstruction needs of its inputs and targets.
    Raises ValueError if the model is not patched or the seed is not in [0, 2**63).
    """
    _check_seed(seed)
    states = {id(block._tome.state): block._tome.state for block in _patched_blocks(model)}.values()
    try:
        for state in states:
            state.reseed(seed)
            state.pinned = True
        _forget_draws(model)
        yield
    finally:
        for state in states:
            state.pinned = False
        _forget_draws(model)


def _forget_draws(model: Any) -> None:
    for block in _patched_blocks(model):
        block._tome.drawn = None


def token_report(model: Any) -> list[TokenCount]:
    """How many tokens each patched block got and processed in its last forward, in the order of the model.

    Raises ValueError if the model is not patched.
    """
    return [block._tome.count for block in _patched_blocks(model)]


class _ModelState:
    """What the patched blocks of a model share: options, generator, and the size of the present latents."""

    def __init__(self, options: MergeOptions, network: nn.Module):
        self.options = options
        self.generator = torch.Generator()
        self.size: tuple[int, int] | None = None  # (H, W)
        self.forwards = 0  # of the whole network, so far
        self.pinned = False  # whether each block keeps its first draw
        self.reseed(options.seed)
        self.hook = network.register_forward_pre_hook(self._note_size, with_kwargs=True)

    def reseed(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        self.forwards += 1  # No block may keep what it drew before.

    def _note_size(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        latents = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            raise ValueError(
                f"token merging needs latents [B, C, H, W] as the first argument of {type(network).__name__}"
            )
        self.size = (latents.shape[2], latents.shape[3])
        self.forwards += 1


class _BlockState:
    """What one patched block carries: its share of the patch, and the matching while its forward runs."""

    def __init__(self, name: str, original_class: type, state: _ModelState):
        self.original_class = original_class
        self.state = state
        self.hooks: list = []
        self.count = TokenCount(name=name, tokens_in=0, tokens_processed=0)
        self.matching: Matching | None = None
        self.drawn: tuple[tuple[int, int, int], torch.Tensor] | None = None

    @contextmanager
    def matching_of(self, x: torch.Tensor) -> Iterator[None]:
        """While this is open, the block's layers merge. x: the block's raw input [B, N, C] (the metric)."""
        self.matching = self._match(x)
        tokens = x.shape[1]
        processed = tokens if self.matching is None else self.matching.tokens_after
        self.count = TokenCount(name=self.count.name, tokens_in=tokens, tokens_processed=processed)
        try:
            yield
        finally:
            self.matching = None

    def _match(self, x: torch.Tensor) -> Matching | None:
        options, tokens = self.state.options, x.shape[1]
        grid = self._grid(tokens)
        r = int(tokens * options.ratio)
        if grid is None or r <= 0:
            return None
        h, w = grid
        drawn = options.use_rand and (x.shape[0] % 2 == 0 or self.state.pinned)
        choice = self._draw(w, h) if drawn else None
        return match_tokens(x, w, h, options.sx, options.sy, r, choice)

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """(h, w) of the block's tokens; None where they are too coarse to be merged."""
        if self.state.size is None:
            raise ValueError("token merging does not know the latents' size yet: run the whole model once first")
        H, W = self.state.size
        estimate = max(1, math.ceil(math.sqrt(H * W // tokens)))
        if estimate > self.state.options.max_downsample:
            return None
        # Odd sizes, rounded up at each level, can make the estimate too small.
        for downsample in (estimate, *DOWNSAMPLES):
            h, w = math.ceil(H / downsample), math.ceil(W / downsample)
            if h * w == tokens:
                return (h, w) if downsample <= self.state.options.max_downsample else None
        raise ValueError(f"{tokens} tokens are no downsampled {H} x {W} grid: token merging cannot tell their places")

    def _draw(self, w: int, h: int) -> torch.Tensor:
        """The destinations for a w x h grid, drawn once per forward of the model.

        A block that runs again in the same forward (gradient checkpointing) or by itself after it (the
        reconstruction of a quantized block) merges as it did before; the two runs would not match otherwise.
        """
        key = (-1 if self.state.pinned else self.state.forwards, w, h)
        if self.drawn is None or self.drawn[0] != key:
            options = self.state.options
            choice = choose_destinations(w, h, options.sx, options.sy, self.state.generator)
            self.drawn = (key, choice)
        return self.drawn[1]

    def merge_input(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a layer whose first positional argument is [B, N, C]."""
        if self.matching is None:
            return None
        tokens = self.matching.tokens_before
        if args[0].shape[:2] != (self.matching.batch, tokens):
            raise ValueError("token merging and chunked layers exclude each other: switch forward chunking off")
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("encoder_hidden_states") is None and mask.shape[-1] == tokens:
            raise ValueError("token merging cannot merge an attention mask over image tokens: leave it away")
        return (self.matching.merge(args[0]), *args[1:]), kwargs

    def unmerge_output(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the same layer."""
        return None if self.matching is None else self.matching.unmerge(output)


@cache
def _patched_class(block_class: type) -> type:
    """A subclass of block_class that matches its input's tokens around the method that does the work."""
    # Our blocks wrap `_forward` in gradient checkpointing; those of diffusers have only `forward`.
    entry = "_forward" if hasattr(block_class, "_forward") else "forward"
    work = getattr(block_class, entry)

    def matched(self, *args, **kwargs):
        with self._tome.matching_of(_first_argument(args, kwargs)):
            return work(self, *args, **kwargs)

    # Same name: diffusers looks its blocks up by it (regional compilation, device maps).
    body = {entry: matched, "__module__": __name__, "__doc__": f"{block_class.__qualname__} with merged tokens."}
    return type(block_class.__name__, (block_class,), body)


def _first_argument(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))


def _patch_block(name: str, block: nn.Module, state: _ModelState) -> None:
    tome = _BlockState(name, type(block), state)
    for layer_name in state.options.layers():
        layer = getattr(block, layer_name)
        if layer is None:  # diffusers: a block without cross-attention
            continue
        # First in, last out of what is registered so far: other hooks keep seeing what the layer works on.
        tome.hooks.append(layer.register_forward_pre_hook(tome.merge_input, prepend=True, with_kwargs=True))
        tome.hooks.append(layer.register_forward_hook(tome.unmerge_output))
    block._tome = tome
    block.__class__ = _patched_class(type(block))


def _restore_block(block: nn.Module) -> None:
    tome = block._tome
    for hook in tome.hooks:
        hook.remove()
    block.__class__ = tome.original_class
    del block._tome


def _check_block(name: str, block: nn.Module) -> None:
    missing = [layer for layer in ("attn1", "attn2", "ff") if not hasattr(block, layer)]
    if missing:
        raise ValueError(f"block {name} has no {', '.join(missing)}: token merging does not know this architecture")


def _network_of(model: Any) -> nn.Module:
    """The network inside the model whose first argument is the latents: the innermost that has blocks in it."""
    network = model
    while True:
        inner = [getattr(network, name, None) for name in INNER_NAMES]
        inner = [module for module in inner if isinstance(module, nn.Module) and _blocks_of(module)]
        if not inner:
            break
        network = inner[0]
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(model).__name__} is no module and has no `unet`: pass a model or a diffusers pipeline")
    return network


def _blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """name -> block, found by class name anywhere among the ancestors, so that nobody's model is imported."""
    return {
        name: module
        for name, module in network.named_modules()
        if any(ancestor.__name__ == BLOCK_CLASS for ancestor in type(module).__mro__)
    }


def _patched_blocks(model: Any) -> list[nn.Module]:
    blocks = [block for block in _blocks_of(_network_of(model)).values() if _is_patched(block)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no merged tokens: call tomesd.apply_patch first")
    return blocks


def _is_patched(block: nn.Module) -> bool:
    return "_tome" in vars(block)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_seed(seed: Any) -> None:
    if not _is_int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}: it must be a whole number in [0, 2**63)")
