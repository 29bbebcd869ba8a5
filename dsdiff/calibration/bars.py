"""Progress bars of a calibration, one for each of its phases."""

from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from qdiff.calibrate import Step


class PhaseBars:
    """Shows a bar for the phase at work, which counts in the phase's own unit.

    work: each step of the calibration with its total, in order. finished: how many of them were finished before.
    units: what a phase counts. shown: False hides the bars. Use it as a context manager.
    """

    def __init__(
        self, work: Sequence[tuple[Step, int]], finished: int, units: Mapping[str, str], *, shown: bool = True
    ):
        self.totals: dict[str, int] = {}
        self.begun: dict[str, int] = {}
        for number, (step, amount) in enumerate(work):
            self.totals[step.phase] = self.totals.get(step.phase, 0) + amount
            self.begun[step.phase] = self.begun.get(step.phase, 0) + (amount if number < finished else 0)
        self.units, self.shown = units, shown
        self.phase = ""
        self.bar: tqdm | None = None

    def advance(self, step: Step, n: int) -> None:
        """Count n more of the step's phase."""
        if step.phase != self.phase or self.bar is None:
            self.close()
            self.phase = step.phase
            total, begun = self.totals[step.phase], self.begun[step.phase]
            unit = self.units[step.phase]
            self.bar = tqdm(total=total, initial=begun, desc=step.phase, unit=unit, disable=not self.shown)
        self.bar.set_postfix_str(step.unit.removeprefix("model."), refresh=False)
        self.bar.update(n)

    def close(self) -> None:
        """Leave the present bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> "PhaseBars":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
