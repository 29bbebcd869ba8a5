"""Bipartite soft matching on a token grid: which tokens to merge, how to merge them and how to undo it.

Paper: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), section 4; the matching itself is
section 3 of Bolya et al., "Token Merging: Your ViT but Faster" (2022). The tokens are split into destinations
(dst: one in each sy x sx tile of the grid) and sources (src: all others); the r sources that resemble a
destination most are averaged into it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

# (tokens [B, N, C], places of sources [S], places of destinations [D]) -> the cosine similarity of each source to the
# destination that it resembles most, [B, S], and the latter as a place among the destinations, int64 [B, S]. None where
# it does not know tokens of this kind.
Nearest = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor] | None"]

MERGE_MODES = ("mean", "sum", "amax")


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which tokens of a [B, N, C] tensor are merged into which: r of N tokens go, N - r remain. All fields are int64.

    a_idx [N - D], b_idx [D]: grid positions of the sources and of the D destinations, in no particular order.
    unm_idx [B, N - D - r]: the sources that stay, as places in a_idx, by descending similarity.
    src_idx [B, r]: the sources that are merged, as places in a_idx, by descending similarity.
    dst_idx [B, r]: the destination that each of them joins, as a place in b_idx.
    """

    a_idx: torch.Tensor
    b_idx: torch.Tensor
    unm_idx: torch.Tensor
    src_idx: torch.Tensor
    dst_idx: torch.Tensor

    @property
    def batch(self) -> int:
        return self.unm_idx.shape[0]

    @property
    def tokens_before(self) -> int:
        return self.a_idx.numel() + self.b_idx.numel()

    @property
    def tokens_after(self) -> int:
        return self.unm_idx.shape[1] + self.b_idx.numel()

    def merge(self, x: torch.Tensor, mode: str = "mean") -> torch.Tensor:
        """Merge [B, N, C] into [B, N - r, C]: the sources that stay, then the destinations.

        mode: "mean", "sum" or "amax" over a destination and all that joined it. On CUDA the sums are atomic,
        so the last bit may differ from run to run.
        Raises ValueError for another mode and for tokens of another number or batch.
        """
        if mode not in MERGE_MODES:
            raise ValueError(f"unknown merge mode {mode!r}: choose one of {', '.join(MERGE_MODES)}")
        self._check(x, self.tokens_before)
        unmerged = _take(x, self._unmerged_at)
        sources = _take(x, self._sources_at)
        joins = self.dst_idx.unsqueeze(-1).expand_as(sources)
        merged = x[:, self.b_idx].scatter_reduce(1, joins, sources, reduce=mode)
        return torch.cat([unmerged, merged], dim=1)

    def unmerge(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `merge`, [B, N - r, C] -> [B, N, C]: each token gets the value of the merged token it is part of.

        Raises ValueError for tokens of another number or batch.
        """
        self._check(x, self.tokens_after)
        return _take(x, self._place_of_each_token)

    @cached_property
    def log_sizes(self) -> torch.Tensor:
        """The logarithm of the number of tokens in each merged token, float32 [B, N - r]."""
        sizes = torch.ones(self.batch, self.tokens_after, device=self.unm_idx.device)
        joins = self.unm_idx.shape[1] + self.dst_idx
        return sizes.scatter_add_(1, joins, torch.ones_like(joins, dtype=sizes.dtype)).log_()

    @cached_property
    def _unmerged_at(self) -> torch.Tensor:
        return self.a_idx[self.unm_idx]

    @cached_property
    def _sources_at(self) -> torch.Tensor:
        return self.a_idx[self.src_idx]

    @cached_property
    def _place_of_each_token(self) -> torch.Tensor:
        """Return the position of each grid token in the merged sequence, int64 [B, N]."""
        batch, staying = self.unm_idx.shape
        device = self.unm_idx.device
        place = torch.empty(batch, self.tokens_before, dtype=torch.long, device=device)
        place[:, self.b_idx] = staying + torch.arange(self.b_idx.numel(), device=device)
        place.scatter_(1, self._unmerged_at, torch.arange(staying, device=device).expand(batch, -1))
        place.scatter_(1, self._sources_at, staying + self.dst_idx)
        return place

    def _check(self, x: torch.Tensor, tokens: int) -> None:
        if x.ndim != 3 or x.shape[:2] != (self.batch, tokens):
            raise ValueError(
                f"tokens of shape {list(x.shape)} do not fit this matching: expected [{self.batch}, {tokens}, C]"
            )


def choose_destinations(w: int, h: int, sx: int, sy: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw which token of each tile is the destination: [h // sy, w // sx] int64 in 0 .. sx * sy - 1.

    generator: the source of the draw. None means a new one with seed 0: the draw is the same each time, and the
    global generator is never touched. The result is on the generator's device.
    """
    sx, sy = _clip_tile(w, h, sx, sy)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return torch.randint(sx * sy, (h // sy, w // sx), generator=generator, device=generator.device)


@torch.no_grad()
def match_tokens(
    metric: torch.Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    choice: torch.Tensor | None = None,
    nearest: Nearest | None = None,
) -> Matching | None:
    """Match the tokens of a w x h grid (bipartite soft matching); return None if r <= 0: nothing is to be merged.

    Each source keeps its best edge, and the r best of these merge (Bolya et al. 2022, section 3).

    metric: [B, h * w, C], row-major; tokens are compared by cosine similarity, a zero vector being at 0 to all.
    sx, sy: width and height of a tile. The columns and rows that fill no tile hold sources only; a tile wider
        or higher than the grid is clipped to it.
    r: number of tokens to merge, capped at the number of sources. For r = int(ratio * h * w) a ratio of about
        0.5 is wise; the most that can go is 1 - 1 / (sx * sy).
    choice: from choose_destinations; None takes the first token of every tile.
    nearest: compares tokens in place of PyTorch, where it can.
    Raises ValueError if the grid, the tile or the choice does not fit.
    """
    _check_grid(metric, w, h, sx, sy)
    if r <= 0:
        return None
    sx, sy = _clip_tile(w, h, sx, sy)
    a_idx, b_idx = _split_grid(w, h, sx, sy, choice, metric.device)
    r = min(r, a_idx.numel())

    found = None if nearest is None else nearest(metric, a_idx, b_idx)
    best, partner = _nearest(metric, a_idx, b_idx) if found is None else found
    order = best.argsort(dim=-1, descending=True, stable=True)
    src_idx = order[:, :r]
    return Matching(a_idx=a_idx, b_idx=b_idx, unm_idx=order[:, r:], src_idx=src_idx, dst_idx=partner.gather(1, src_idx))


def _nearest(
    metric: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare tokens by PyTorch, see Nearest."""
    unit = _normalize(metric)
    scores = unit[:, sources] @ unit[:, destinations].transpose(-1, -2)  # [B, S, D]
    best, partner = scores.max(dim=-1)
    return best, partner


def bipartite_soft_matching_random2d(
    metric: torch.Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Return the functions (merge, unmerge) for a w x h grid of tokens; both are the identity if r <= 0.

    merge(x, mode="mean"): [B, h * w, C] -> [B, h * w - r, C]; unmerge(x): back to [B, h * w, C].
    no_rand: take the first token of every tile as destination, instead of a random one (choose_destinations).
    The other arguments, and the errors, are those of match_tokens and choose_destinations.
    """
    _check_grid(metric, w, h, sx, sy)
    if r <= 0:
        return _identity, _identity
    choice = None if no_rand else choose_destinations(w, h, sx, sy, generator)
    matching = match_tokens(metric, w, h, sx, sy, r, choice)
    assert matching is not None, "r is above 0"
    return matching.merge, matching.unmerge


def _identity(x: torch.Tensor, mode: str = "mean") -> torch.Tensor:
    return x


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take M tokens of each sample: x [B, N, C], index [B, M] -> [B, M, C]."""
    # index_select on the flattened batch copies whole rows: several times faster than a gather of single numbers.
    first = torch.arange(len(x), device=index.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, x.shape[-1])


def _normalize(metric: torch.Tensor) -> torch.Tensor:
    """Scale each token to length 1; a zero vector stays zero."""
    norm = metric.norm(dim=-1, keepdim=True)
    return metric / torch.where(norm == 0, torch.ones_like(norm), norm)


def _clip_tile(w: int, h: int, sx: int, sy: int) -> tuple[int, int]:
    return min(sx, w), min(sy, h)


def _split_grid(
    w: int, h: int, sx: int, sy: int, choice: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grid positions of the sources [N - D] and of the destinations [D]."""
    rows, cols = h // sy, w // sx
    if choice is None:
        choice = torch.zeros(rows, cols, dtype=torch.long, device=device)
    elif choice.shape != (rows, cols):
        raise ValueError(
            f"a choice of shape {list(choice.shape)} does not fit {rows} x {cols} tiles: draw it for this grid"
        )
    choice = choice.to(device)
    y = torch.arange(rows, device=device).unsqueeze(1) * sy + choice // sx
    x = torch.arange(cols, device=device) * sx + choice % sx
    key = torch.zeros(h * w, dtype=torch.long, device=device)
    key.index_fill_(0, (y * w + x).flatten(), -1)  # an assignment copies -1 from the CPU, which no CUDA graph records
    # A sort splits the grid without asking the device for a count. It is the plain, unstable sort of the reference
    # implementation: the order among equal keys changes no decision, but the same order gives the same rounding.
    order = key.argsort()
    return order[rows * cols :], order[: rows * cols]


def _check_grid(metric: torch.Tensor, w: int, h: int, sx: int, sy: int) -> None:
    if min(w, h) < 1 or min(sx, sy) < 1:
        raise ValueError(f"a {w} x {h} grid with {sx} x {sy} tiles: all four must be at least 1")
    if metric.ndim != 3 or metric.shape[1] != w * h:
        raise ValueError(f"metric of shape {list(metric.shape)} is no {w} x {h} grid: expected [B, {w * h}, C]")
