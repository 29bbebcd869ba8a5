"""The hooks that merge tokens in a patched network: one on the network, two on each block, two on each merged layer.

In the order in which they run:
1. before the network: note the size of the latents (ModelMerging.note_size);
2. before a block: match its tokens (BlockMerging.begin);
3. before a layer: merge its input; after it: unmerge its output (merge_input, unmerge_output);
4. after the block: end the matching (BlockMerging.end).
The block's other layers (norms, residual additions, and whatever else it has) see all tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from .merge import Matching, Nearest, choose_destinations, match_tokens
from .options import DOWNSAMPLES, MergeOptions

ATTRIBUTE = "token_merging"  # of a patched block: its BlockMerging


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """The tokens of a block in its last forward; zeros before the first.

    name: the block's name within the diffusion model. tokens_in: tokens it was given, per sample.
    tokens_processed: tokens that its merged layers worked on.
    """

    name: str
    tokens_in: int
    tokens_processed: int


class ModelMerging:
    """The state that the patched blocks of a network share: options, generator, and the size of the latents."""

    def __init__(self, options: MergeOptions, network: nn.Module, nearest: Nearest | None):
        self.options = options
        self.nearest = nearest
        self.generator = torch.Generator()
        self.size: tuple[int, int] | None = None  # (H, W) of the latents
        self.forwards = 0  # of the whole network, so far
        self.pinned = False  # True: each block keeps its first draw
        self.reseed(options.seed)
        self.handle = network.register_forward_pre_hook(self.note_size, with_kwargs=True)

    def reseed(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        self.forwards += 1  # No block may keep what it drew before.

    def note_size(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the network."""
        latents = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
            raise ValueError(
                f"token merging needs latents [B, C, H, W] as the first argument of {type(network).__name__}"
            )
        self.size = (latents.shape[2], latents.shape[3])
        self.forwards += 1

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Return (h, w) of a block's tokens; None if they are too coarse to be merged.

        Raises ValueError before the first forward, and for tokens that fill no downsampled grid of latents.
        """
        if self.size is None:
            raise ValueError("token merging does not know the latents' size yet: run the whole model once first")
        H, W = self.size
        estimate = max(1, math.ceil(math.sqrt(H * W // tokens)))
        if estimate > self.options.max_downsample:
            return None
        # Odd sizes, rounded up at each level, can make the estimate too small.
        for downsample in (estimate, *DOWNSAMPLES):
            h, w = math.ceil(H / downsample), math.ceil(W / downsample)
            if h * w == tokens:
                return (h, w) if downsample <= self.options.max_downsample else None
        raise ValueError(f"{tokens} tokens are no downsampled {H} x {W} grid: token merging cannot tell their places")


@dataclass(kw_only=True)
class _Run:
    """One forward of a block, while it lasts."""

    forward: int  # number of the network's forward that it belongs to
    matching: Matching | None = None  # None: nothing is merged
    residual: torch.Tensor | None = None  # taken from the call of the layer that is running


class BlockMerging:
    """The attribute `token_merging` of a patched block: its hooks, its matching, its count of tokens."""

    def __init__(self, name: str, block: nn.Module, model: ModelMerging):
        self.model = model
        self.count = TokenCount(name=name, tokens_in=0, tokens_processed=0)
        self.handles = self._register(block)
        # Runs that have begun and not ended, the innermost last: a hook inside a block may run the block again.
        self.runs: list[_Run] = []
        self.recomputed: _Run | None = None
        self.drawn: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def _register(self, block: nn.Module) -> list[RemovableHandle]:
        # The block's two hooks enclose its forward as closely as they can: hooks that are there already have
        # changed the input by then, and see the output after the matching has ended.
        handles = [
            block.register_forward_pre_hook(self.begin, with_kwargs=True),
            block.register_forward_hook(self.end, prepend=True, always_call=True),
        ]
        for layer_name in self.model.options.layers():
            layer: nn.Module | None = getattr(block, layer_name)
            if layer is None:  # diffusers: a block without cross-attention
                continue
            # First in, last out of what is there already: other hooks keep seeing what the layer works on.
            handles.append(layer.register_forward_pre_hook(self.merge_input, prepend=True, with_kwargs=True))
            handles.append(layer.register_forward_hook(self.unmerge_output))
        return handles

    def remove(self) -> None:
        """Remove all hooks, that of the network included."""
        self.model.handle.remove()
        for handle in self.handles:
            handle.remove()

    # --- hooks of the block -----------------------------------------------------------------------------------

    def begin(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: match the tokens of the block's input [B, N, C]."""
        self.recomputed = None
        # torch calls no hook after a KeyboardInterrupt: runs that it cut off are dropped here.
        forward = self.model.forwards
        self.runs = [run for run in self.runs if run.forward == forward]
        run = _Run(forward=forward)
        self.runs.append(run)  # before anything can fail, since `end` is called in any case
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"token merging needs tokens [B, N, C] as the first argument of {type(block).__name__}")
        run.matching = self._match(x)
        tokens = x.shape[1]
        processed = tokens if run.matching is None else run.matching.tokens_after
        self.count = TokenCount(name=self.count.name, tokens_in=tokens, tokens_processed=processed)
        if run.matching is not None and x.grad_fn is not None:  # a leaf would keep the hook beyond the graph
            x.register_hook(self._input_gradient)

    def end(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, also called (with an output of None) when the forward has failed: end the matching.

        A block with gradient checkpointing inside its forward (CompVis: `checkpoint(self._forward, ...)`) computes
        its layers anew in the backward pass, and no hook of the block is called then. But the gradient of the
        block's output arrives before, and that of its input afterwards. A hook on the output brings the matching
        back, and one on the input ends it again. So the matching belongs to the graph: each of several graphs has
        its own, and it is freed with the graph.
        """
        run = self.runs.pop() if self.runs else None  # none if another pre-hook failed before `begin`
        if run is None or run.matching is None or not isinstance(output, torch.Tensor) or not output.requires_grad:
            return

        def output_gradient(gradient: torch.Tensor) -> None:
            self.recomputed = run

        output.register_hook(output_gradient)

    def _input_gradient(self, gradient: torch.Tensor) -> None:
        self.recomputed = None

    # --- hooks of its layers ----------------------------------------------------------------------------------

    def _running(self) -> _Run | None:
        if self.runs:
            return self.runs[-1]
        # An input without gradient does not tell when the recomputation is over: the matching then stays until the
        # block's next forward. A recomputation always runs with gradients enabled, so nothing else uses it.
        return self.recomputed if torch.is_grad_enabled() else None

    def merge_input(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of a layer whose first positional argument is [B, N, C].

        The keyword `residual` [B, N, C] asks a layer to add its output to that tensor. The layer sees merged tokens
        and the residual has all of them, so it is left out of the call and added by `unmerge_output`.
        """
        run = self._running()
        if run is None or run.matching is None:
            return None
        tokens = run.matching.tokens_before
        if args[0].shape[:2] != (run.matching.batch, tokens):
            raise ValueError("token merging and chunked layers exclude each other: switch forward chunking off")
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("encoder_hidden_states") is None and mask.shape[-1] == tokens:
            raise ValueError("token merging cannot merge an attention mask over image tokens: leave it away")
        run.residual = kwargs.get("residual")
        rest = {key: value for key, value in kwargs.items() if key != "residual"}
        return (run.matching.merge(args[0]), *args[1:]), rest

    def unmerge_output(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the same layer."""
        run = self._running()
        if run is None or run.matching is None:
            return None
        unmerged = run.matching.unmerge(output)
        if run.residual is not None:
            unmerged = unmerged.add_(run.residual)  # in place on a new tensor: nobody else holds it
            run.residual = None
        return unmerged

    # --- which tokens -----------------------------------------------------------------------------------------

    def _match(self, x: torch.Tensor) -> Matching | None:
        model, tokens = self.model, x.shape[1]
        options = model.options
        grid = model.grid(tokens)
        r = int(tokens * options.ratio)
        if grid is None or r <= 0:
            return None
        h, w = grid
        drawn = options.use_rand and (x.shape[0] % 2 == 0 or model.pinned)
        choice = self._draw(w, h) if drawn else None
        return match_tokens(x, w, h, options.sx, options.sy, r, choice, model.nearest)

    def _draw(self, w: int, h: int) -> torch.Tensor:
        """Return the destinations for a w x h grid, drawn once per forward of the network.

        A block that runs again in the same forward (gradient checkpointing around it) or by itself afterwards (the
        reconstruction of a quantized block) must merge as it did before, or the two runs would not match.
        """
        key = (-1 if self.model.pinned else self.model.forwards, w, h)
        if self.drawn is None or self.drawn[0] != key:
            options = self.model.options
            choice = choose_destinations(w, h, options.sx, options.sy, self.model.generator)
            self.drawn = (key, choice)
        return self.drawn[1]
