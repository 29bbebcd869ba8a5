"""The options of token merging. Importing them imports no torch."""

from dataclasses import dataclass

from .schedule import DOWNSAMPLES, Schedule, parse_limits

__all__ = ["DOWNSAMPLES", "MergeOptions", "check_seed"]

SWITCHES = ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp", "merge_kv", "proportional", "merge_share")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Which tokens are merged, around which layers. The defaults are those of PyPI's tomesd.

    ratio: the share of the tokens to merge away, in [0, 1 - 1 / (sx * sy)]. With the defaults up to 0.5 is wise, and
        0.75 is visible; with merge_kv, proportional and tiles of 4 x 4, 0.75 loses less than 0.5 does.
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
    proportional: a key counts in self-attention as often as tokens were merged into it (Bolya et al. 2022, eq. 1).
        Costs next to no time, and takes most of the loss away.
    merge_kv: in self-attention, merge keys and values alone; every query stays, so that nothing is unmerged.
    merge_schedule: the ratio by step, "0:0.7,0.5:0.3" or "linear:0.7:0.3" (see `tomesd.schedule.Schedule`). `ratio`
        holds before its first place; with None, in all steps.
    merge_levels: the largest ratio by level, "1:0.6,2:0.3": level N sees the latents at 1/N of their size. Nothing is
        merged at other levels. None: max_downsample says where.
    merge_every: match tokens in every so many steps only, and use the same matching in the steps between; 1 or more.
    merge_share: match tokens in the first block of each level only; its other blocks merge as that one does.
    Raises ValueError for other values, for those that would have no effect, and if nothing is left to merge around.
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
    proportional: bool = False
    merge_kv: bool = False
    merge_schedule: str | None = None
    merge_levels: str | None = None
    merge_every: int = 1
    merge_share: bool = False

    def __post_init__(self) -> None:
        for name in ("sx", "sy", "merge_every"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, 1 or more")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if not _is_int(self.max_downsample) or self.max_downsample not in DOWNSAMPLES:
            raise ValueError(f"max_downsample is {self.max_downsample!r}: it must be 1, 2, 4 or 8")
        self._check_ratios()
        self._check_together()
        check_seed(self.seed)

    def _check_ratios(self) -> None:
        limit = 1 - 1 / (self.sx * self.sy)
        ratios: list[tuple[str, object]] = [("ratio", self.ratio)]
        if self.merge_schedule is not None:
            ratios += [("a ratio of merge_schedule", ratio) for ratio in Schedule.parse(self.merge_schedule).ratios]
        if self.merge_levels is not None:
            ratios += [("a ratio of merge_levels", ratio) for ratio in parse_limits(self.merge_levels).values()]
        for name, ratio in ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= limit:
                raise ValueError(
                    f"{name} is {ratio!r}: with tiles of {self.sx} x {self.sy} it must lie in [0, {limit:g}]; "
                    "larger tiles allow more"
                )

    def _check_together(self) -> None:
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("nothing to merge: switch on merge_attn, merge_crossattn or merge_mlp")
        for name in ("merge_kv", "proportional"):
            if getattr(self, name) and not self.merge_attn:
                raise ValueError(f"{name} is about self-attention, and has no effect without merge_attn")
        if self.merge_levels is not None and self.max_downsample != 1:
            raise ValueError("max_downsample has no effect beside merge_levels, which names the levels: leave one out")

    def layers(self) -> tuple[str, ...]:
        """Return the names of a block's layers around which tokens are merged."""
        wanted = {"attn1": self.merge_attn, "attn2": self.merge_crossattn, "ff": self.merge_mlp}
        return tuple(name for name, on in wanted.items() if on)

    @property
    def follows_steps(self) -> bool:
        """True if what is merged depends on the step, so that the patch must be told of the walk (`tomesd.walk`)."""
        return self.merge_schedule is not None or self.merge_every > 1

    @property
    def is_scheduled_throughout(self) -> bool:
        """True if the schedule gives the ratio of every step, so that `ratio` is not used."""
        return self.merge_schedule is not None and Schedule.parse(self.merge_schedule).starts_at_once

    @property
    def follows_others(self) -> bool:
        """True if what a block merges depends on the step or on other blocks, so that it cannot run by itself."""
        return self.follows_steps or self.merge_share

    @property
    def coarsest(self) -> int:
        """The highest downsampling at which tokens are merged."""
        return self.max_downsample if self.merge_levels is None else max(parse_limits(self.merge_levels))

    def ratio_at(self, downsample: int, step: int = 0, steps: int = 1) -> float:
        """Return the ratio in blocks that see the latents at 1/downsample of their size, in step 0, 1, ... of `steps`.

        For a schedule, the step must be known.
        """
        if downsample > self.coarsest:
            return 0.0
        scheduled = None if self.merge_schedule is None else Schedule.parse(self.merge_schedule).at(step, steps)
        ratio = self.ratio if scheduled is None else scheduled
        return ratio if self.merge_levels is None else min(ratio, parse_limits(self.merge_levels).get(downsample, 0.0))


def check_seed(seed: object) -> None:
    """Raise ValueError if the seed is no whole number in [0, 2**63)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}: it must be a whole number in [0, 2**63)")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
