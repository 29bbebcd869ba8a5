"""Learning-rate schedules, as factors of the base learning rate."""

from collections.abc import Sequence

import torch

from ldm.util import instantiate_from_config


class LambdaLinearScheduler:
    """Linear warm-up, then linear change, cycle after cycle.

    Each argument lists one value a cycle: in a cycle of `cycle_lengths` steps the factor rises from `f_start` to
    `f_max` over `warm_up_steps` and then goes linearly to `f_min` at the cycle's end.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[float],
    ):
        lengths = {len(warm_up_steps), len(f_min), len(f_max), len(f_start), len(cycle_lengths)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("the scheduler's lists must have one value for each cycle, so the same length")
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))

    def schedule(self, step: int) -> float:
        """The factor at a step, counted from 0. After the last cycle it stays at that cycle's `f_min`."""
        for warm_up, f_min, f_max, f_start, length in self.cycles:
            if step < warm_up:
                return f_start + (f_max - f_start) * step / warm_up
            if step < length:
                return f_min + (f_max - f_min) * (length - step) / length
            step -= length
        return f_min


def with_scheduler(optimizer: torch.optim.Optimizer, scheduler_config: dict | None) -> dict:
    """What a LightningModule's configure_optimizers returns: the optimizer, and its schedule stepped every batch."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    # A plain function: LambdaLR would save an object's fields, and a resumed run not see a changed config.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: factor.schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
