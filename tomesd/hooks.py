"""The hooks that merge tokens in a patched network: one on the network, two on each block, two on each merged layer.

In the order in which they run:
1. before the network: note the size of the latents (ModelMerging.note_size);
2. before a block: match its tokens (BlockMerging.begin);
3. before a layer: merge its input; after it: unmerge its output (merge_input, unmerge_output). With `merge_kv`, before
   self-attention: give it the merged tokens as its context, and unmerge nothing (merge_context);
4. after the block: end the matching (BlockMerging.end).
The block's other layers (norms, residual additions, and whatever else it has) see all tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from .merge import Matching, choose_destinations, match_tokens
from .network import CONTEXT_NAMES, MASK_NAMES, argument_name
from .state import Kept, ModelMerging, TokenCount

ATTRIBUTE = "token_merging"  # of a patched block: its BlockMerging


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
        self.kept: Kept = {}
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
            keys_alone = layer_name == "attn1" and self.model.options.merge_kv
            before = self.merge_context if keys_alone else self.merge_input
            handles.append(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            if not keys_alone:
                handles.append(layer.register_forward_hook(self.unmerge_output))
            if layer_name == "attn1" and self.model.options.proportional:
                handles.append(layer.register_forward_pre_hook(self.weigh_keys, prepend=True, with_kwargs=True))
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
        _check_layer(run.matching, args, kwargs)
        run.residual = kwargs.get("residual")
        rest = {key: value for key, value in kwargs.items() if key != "residual"}
        return (run.matching.merge(args[0]), *args[1:]), rest

    def merge_context(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of self-attention: its keys and values are those of the merged tokens, its queries stay."""
        run = self._running()
        if run is None or run.matching is None:
            return None
        _check_layer(run.matching, args, kwargs)
        return args[:1], {**kwargs, argument_name(layer, CONTEXT_NAMES): run.matching.merge(args[0])}

    def weigh_keys(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of self-attention, before the others: softmax(q k^T / sqrt(d) + log s) for keys of sizes s.

        A key that stands for s equal tokens then has the weight of all of them (Bolya et al. 2022, eq. 1).
        """
        run = self._running()
        if run is None or run.matching is None:
            return None
        _check_layer(run.matching, args, kwargs)
        name, added = argument_name(layer, MASK_NAMES), run.matching.log_sizes.to(args[0].dtype)
        if kwargs.get(name) is not None:
            raise ValueError(f"merging with proportional weights takes the place of {name}: leave it away")
        return args, {**kwargs, name: added if name == "mask" else added.unsqueeze(1)}  # diffusers: [B, 1, M]

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
        """Return how to merge tokens [B, N, C]; None if nothing is to be merged."""
        model, tokens = self.model, x.shape[1]
        grid = model.grid(tokens)
        if grid is None:
            return None
        h, w, downsample = grid
        store, place = model.kept if model.options.merge_share else self.kept, (len(x), h, w, x.device)
        forward, matching = store.get(place, (-1, None))
        if forward < model.matched:
            matching = self._match_anew(x, h, w, int(tokens * model.ratio(downsample)))
            if matching is not None and (model.options.merge_share or model.options.merge_every > 1):
                store[place] = (model.forwards, matching)
        return matching

    def _match_anew(self, x: torch.Tensor, h: int, w: int, r: int) -> Matching | None:
        options = self.model.options
        drawn = options.use_rand and (x.shape[0] % 2 == 0 or self.model.pinned)
        choice = self._draw(w, h) if drawn else None
        return match_tokens(x, w, h, options.sx, options.sy, r, choice, self.model.nearest)

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


def _check_layer(matching: Matching, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a call of a layer whose tokens cannot be merged."""
    tokens = matching.tokens_before
    if args[0].shape[:2] != (matching.batch, tokens):
        raise ValueError("token merging and chunked layers exclude each other: switch forward chunking off")
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("encoder_hidden_states") is None and mask.shape[-1] == tokens:
        raise ValueError("token merging cannot merge an attention mask over image tokens: leave it away")
