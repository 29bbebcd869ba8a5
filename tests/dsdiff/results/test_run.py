"""The rows of the table of results: their prompts, their folders, and their change against the baseline."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdiff.images.sources import SHAPES_SEED
from dsdiff.metrics.scores import Score, Scores
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.models.spec import find_model
from dsdiff.options import ModelOptions
from dsdiff.results import run
from dsdiff.results.options import TABLE, ResultsOptions
from dsdiff.results.table import Row, read_table
from ldm.data.shapes import ShapesDataset, caption

CALI = CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][4]
PROMPTS = ["a red circle", "a blue ring"]


@pytest.fixture
def protocol():
    return read_table(TABLE)[1]["embedded"]


def plan(protocol, prompts=PROMPTS, rows=None, ckpt=None, **changes):
    """Return the tasks of the shipped table's rows with the embedded model."""
    options = ResultsOptions(**{"outdir": Path("out"), "device": "cpu", **changes})
    spec = find_model(ModelOptions(config=EMBEDDED, ckpt=ckpt))
    return run.plan_tasks(rows or read_table(TABLE)[0], spec, protocol, prompts, CALI, options)


# --- prompts -----------------------------------------------------------------------------------------------


def test_prompts_of_imagenet():
    _, protocols = read_table(TABLE)
    prompts = run.prompts_of(protocols["sd-v1"], 2000)
    assert len(prompts) == 2000 and len(set(prompts)) == 1000
    assert prompts[:3] == ["A high quality photograph of a tench"] * 2 + ["A high quality photograph of a goldfish"]
    assert prompts[-1] == "A high quality photograph of a toilet tissue"
    few = run.prompts_of(protocols["sd-v1"], 10)
    assert len(set(few)) == 10 and few[5] == prompts[1000]


def test_captions_are_not_those_of_the_reference(protocol):
    reference = ShapesDataset(50, "heldout", 256, SHAPES_SEED)
    ours = run.prompts_of(protocol, 50)
    assert len(set(ours) & {caption(reference.spec(i)) for i in range(50)}) < 5  # short captions may come twice


# --- folders -----------------------------------------------------------------------------------------------


def test_rows_are_drawn_as_the_table_says(protocol):
    rows = [Row(name="FP32", ratio=0.5), Row(name="W4A32", ratio=0.0, weight_bit=4)]
    first, second = (task.pictures for task in plan(protocol, rows=rows))
    assert first.settings.quantization is None and first.settings.merge.ratio == 0.5 and first.engine == "float"
    assert second.settings.merge is None and second.settings.quantization.bits.startswith("W4A32")
    assert second.settings.quantization.cali_ckpt == str(CALI)
    for settings in (first.settings, second.settings):
        assert (settings.sampler, settings.steps, settings.precision) == ("dpm_solver", 20, "full")
    assert first.folder.parent == Path("out/pictures") and first.folder.name.startswith("FP32-0.5-")


def test_folders_change_with_all_that_shapes_the_pictures(protocol, random_ckpt):
    folders = {task.pictures.folder for task in plan(protocol)}
    assert len(folders) == len(read_table(TABLE)[0])
    assert {task.pictures.folder for task in plan(protocol, repeats=1, shown=1, pictures=5)} == folders
    others = {
        "batch size": plan(protocol, batch_size=3),
        "order of prompts": plan(protocol, prompts=PROMPTS[::-1]),
        "seed": plan(replace(protocol, seed=1)),
        "guidance": plan(replace(protocol, drawing=replace(protocol.drawing, scale=2.0))),
    }
    for case, tasks in others.items():
        assert folders.isdisjoint(task.pictures.folder for task in tasks), case
    floats = [row for row in read_table(TABLE)[0] if row.weight_bit is None]
    changed = plan(protocol, rows=floats, ckpt=random_ckpt)
    assert folders.isdisjoint(task.pictures.folder for task in changed), "weights"


# --- the change against the baseline -----------------------------------------------------------------------


def scores_of(value, replicates):
    score = Score(name="FID", value=value, n=20, better="lower", replicates=replicates)
    return Scores(by_key={"fid": score})


def test_changes_are_jackknifed_together():
    base = scores_of(2.0, tuple(2.0 + 0.1 * i for i in range(10)))
    row = scores_of(2.2, tuple(1.1 * (2.0 + 0.1 * i) for i in range(10)))  # a tenth more, whatever is left out
    change = run.fid_change(row, base)
    assert (change.value, change.low, change.high) == pytest.approx((10, 10, 10))
    assert run.fid_change(base, base) == run.Change(value=0.0, low=0.0, high=0.0)
    other = run.fid_change(scores_of(2.2, (2.2,) * 10), base)
    shares = np.array([220 / (2.0 + 0.1 * i) - 100 for i in range(10)])
    error = math.sqrt(0.9 * np.square(shares - shares.mean()).sum())
    assert other.high - other.value == pytest.approx(2.262 * error) == other.value - other.low
    assert run.fid_change(scores_of(1.0, ()), scores_of(2.0, ())) == run.Change(value=-50.0, low=None, high=None)


# --- before anything is drawn ------------------------------------------------------------------------------


def test_a_reference_of_another_size_is_told_before_drawing(protocol, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    spec = find_model(ModelOptions(config=EMBEDDED))
    options = ResultsOptions(reference=str(tmp_path), outdir=tmp_path / "out", cache=tmp_path / "c", device="cpu")
    with pytest.raises(ValueError, match="the reference is 64x64, the pictures will be 256x256"):
        run.check(spec, protocol, options)


def test_the_calibration_that_comes_with_the_model_is_taken(protocol, monkeypatch, random_ckpt):
    made = []
    monkeypatch.setattr(run, "ready_made", lambda folder, options: made.append((folder, options)) or Path("made"))
    options = ResultsOptions(outdir=Path("out"), device="cpu")
    assert run.choose_cali_ckpt(find_model(ModelOptions(config=EMBEDDED)), protocol, options) == CALI and not made
    other = find_model(ModelOptions(config=EMBEDDED, ckpt=random_ckpt))
    given = replace(options, cali_ckpt=Path("own"))
    assert run.choose_cali_ckpt(other, protocol, given) == Path("own") and not made
    assert run.choose_cali_ckpt(other, protocol, replace(options, ckpt=random_ckpt)) == Path("made")
    folder, calibration = made[0]
    assert folder.parent == Path("out") and folder.name.startswith("calibration-")
    assert calibration.model == ModelOptions(config=EMBEDDED, ckpt=random_ckpt) and calibration.device == "cpu"
    assert (calibration.weight_bit, calibration.act_bit, calibration.cond) == (4, 8, True)
