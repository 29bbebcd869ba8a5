"""The options of token merging. Importing them imports no torch."""

from dataclasses import dataclass

DOWNSAMPLES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Which tokens are merged, around which layers.

    ratio: the part of the tokens to merge away, in [0, 1 - 1 / (sx * sy)]. Up to 0.5 is wise, 0.75 is visible.
    max_downsample: merge only in blocks that see the latents at 1/max_downsample of their size or larger:
        1, 2, 4 or 8. Most of the gain comes with 1; 2 is wise for large pictures.
    sx, sy: width and height of a tile in tokens. One token of each tile, the destination, is always kept. A tile
        larger than the grid is clipped to it.
    use_rand: draw the destination of each tile instead of taking its first token. An odd batch is never random:
        it may hold a conditional sample without its unconditional one, or the reverse.
    merge_attn: merge around self-attention, which has most of the gain.
    merge_crossattn, merge_mlp: merge around cross-attention, around the feed-forward layer. Both cost more
        quality than they gain.
    seed: start of the patch's own generator of destinations, in [0, 2**63).
    Raises ValueError for other values, and if nothing is left to merge around.
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

    def __post_init__(self) -> None:
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
        check_seed(self.seed)

    def layers(self) -> tuple[str, ...]:
        """Return the names of a block's layers around which tokens are merged."""
        wanted = {"attn1": self.merge_attn, "attn2": self.merge_crossattn, "ff": self.merge_mlp}
        return tuple(name for name, on in wanted.items() if on)


def check_seed(seed: object) -> None:
    """Raise ValueError if the seed is no whole number in [0, 2**63)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}: it must be a whole number in [0, 2**63)")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
