"""The bars of a calibration: one a phase, with what was finished before."""

import io

from dsdiff.calibration import bars as module
from dsdiff.calibration.bars import PhaseBars
from qdiff.calibrate import Step


def test_each_phase_has_its_own_bar_and_begins_where_it_was_left(monkeypatch):
    made = []

    def bar(**options):
        made.append(module_tqdm(file=io.StringIO(), **options))
        return made[-1]

    module_tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", bar)
    steps = [(Step(phase="weights", unit=name), 1) for name in "abc"] + [(Step(phase="ranges"), 40)]
    with PhaseBars(steps, 1, {"weights": "unit", "ranges": "sample"}) as bars:
        bars.advance(steps[1][0], 1)
        bars.advance(steps[2][0], 1)
        for _ in range(2):
            bars.advance(steps[3][0], 20)
    assert [(each.desc, each.unit, each.initial, each.n, each.total) for each in made] == [
        ("weights", "unit", 1, 3, 3),
        ("ranges", "sample", 0, 40, 40),
    ]


def test_hidden_bars_count_nothing(capsys):
    step = Step(phase="ranges")
    with PhaseBars([(step, 4)], 0, {"ranges": "sample"}, shown=False) as bars:
        bars.advance(step, 4)
    assert capsys.readouterr().err == ""
