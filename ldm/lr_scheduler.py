"""Learning-rate schedules, as factors of the base learning rate."""

from collections.abc import Sequence


class LambdaLinearScheduler:
    """Linear warm-up, then linear change, in cycles.

    Each argument lists one value per cycle. In a cycle of `cycle_lengths` steps, the factor rises from `f_start` to
    `f_max` over `warm_up_steps` and then goes linearly to `f_min` at the cycle's end. Raises ValueError for lists of
    different lengths.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[float],
    ) -> None:
        lengths = {len(warm_up_steps), len(f_min), len(f_max), len(f_start), len(cycle_lengths)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("the scheduler's lists must have one value for each cycle, so the same length")
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))

    def schedule(self, step: float) -> float:
        """Return the factor at a step, counted from 0. After the last cycle it is that cycle's `f_min`."""
        for warm_up, f_min, f_max, f_start, length in self.cycles:
            if step < warm_up:
                return f_start + (f_max - f_start) * step / warm_up
            if step < length:
                return f_min + (f_max - f_min) * (length - step) / length
            step -= length
        return self.cycles[-1][1]
