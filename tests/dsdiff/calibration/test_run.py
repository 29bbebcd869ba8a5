"""A whole calibration of a small model, interrupted and not."""

import json
from dataclasses import replace

import pytest

from dsdiff.calibration import calibrate, ready_made, run
from dsdiff.calibration.data import DataPlan
from dsdiff.calibration.kept import Measurement
from dsdiff.calibration.needs import Workload, covers, measure, needs
from dsdiff.calibration.report import describe, summary
from dsdiff.models.spec import find_model
from dsdiff.options import MergeOptions
from dsdiff.pipeline import Pipeline
from qdiff.checkpoint import read_cali_header
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import UnitReport
from qdiff.resume import ProgressFolder

LINEAR = {"quant_mode": "linear", "rounding": None, "iters_w": None, "iters_a": None, "no_grad_ckpt": False}


@pytest.fixture(scope="module")
def calibrated(options, tmp_path_factory):
    """The file of an uninterrupted calibration."""
    return calibrate(replace(options, outdir=tmp_path_factory.mktemp("calibrated")))


@pytest.fixture
def saved_steps(monkeypatch):
    """The numbers of all steps that were kept, in order; after the fifth the calibration is interrupted, once."""
    plain, saved = ProgressFolder.save, []

    def save(self, number, *args):
        plain(self, number, *args)
        saved.append(number)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressFolder, "save", save)
    return saved


def test_writes_the_file_the_report_and_the_data(calibrated):
    names = sorted(path.name for path in calibrated.parent.iterdir())
    assert len(names) == 3 and names[0] == calibrated.name == "cali.safetensors" and names[2] == "report.json"
    assert names[1].startswith("data-")
    header = read_cali_header(calibrated)
    assert (header.config.weight_bit, header.config.act_bit, header.config.sm_abit) == (4, 8, 16)
    assert header.config.quant_act and header.config.split and header.merge is None
    assert header.calibration["samples"] == 8 and header.calibration["quant_mode"] == "qdiff"
    assert header.calibration["processes"] == 1 and header.calibration["data"]["cond"]
    assert header.source["ckpt"] == "small.safetensors" and header.source["config"] == "small.yaml"


def test_no_unit_ends_worse_than_it_began(calibrated):
    report = json.loads((calibrated.parent / "report.json").read_text())
    assert report["settings"] == read_cali_header(calibrated).calibration
    units = [UnitReport(**unit) for unit in report["units"]]
    assert {unit.phase for unit in units} == {"weights", "activations"}
    assert all(unit.after <= unit.before for unit in units)
    assert any(unit.after < unit.before for unit in units)


@pytest.mark.slow
def test_an_interrupted_calibration_taken_up_ends_with_the_same_file(calibrated, options, tmp_path, saved_steps):
    own = replace(options, outdir=tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"\d of \d+ steps done in .* with --resume goes on"):
        calibrate(own)
    with pytest.raises(ValueError, match="holds an unfinished calibration: go on with --resume"):
        calibrate(own)
    with pytest.raises(ValueError, match=r"other settings: recon\.\w+ \("):
        calibrate(replace(own, iters_w=3, resume=True))
    assert calibrate(replace(own, resume=True)).read_bytes() == calibrated.read_bytes()
    assert saved_steps == list(range(len(saved_steps)))  # each step once
    assert not (tmp_path / "progress").exists()
    with pytest.raises(ValueError, match="is finished: leave out --resume"):
        calibrate(replace(own, resume=True))


@pytest.mark.slow
def test_an_interrupted_gptq_taken_up_ends_with_the_same_file(options, tmp_path, saved_steps):
    own = replace(options, outdir=tmp_path / "own", rounding="gptq", iters_w=None, samples_w=6)
    with pytest.raises(KeyboardInterrupt, match=r"\d of \d+ steps done in .* with --resume goes on"):
        calibrate(own)
    with pytest.raises(ValueError, match=r"other settings: recon\.\w+ \("):
        calibrate(replace(own, damp=0.5, resume=True))
    resumed = calibrate(replace(own, resume=True)).read_bytes()
    assert resumed == calibrate(replace(own, outdir=tmp_path / "whole")).read_bytes()
    assert read_cali_header(tmp_path / "own" / "cali.safetensors").calibration["rounding"] == "gptq"


def test_a_ready_made_file_is_made_gone_on_with_and_found(options, tmp_path, monkeypatch):
    calls = []

    def calibrate(own):
        calls.append(own)
        own.outdir.mkdir(exist_ok=True)
        own.target.touch()

    monkeypatch.setattr(run, "calibrate", calibrate)
    assert ready_made(tmp_path / "new", options) == tmp_path / "new" / "cali.safetensors"
    ProgressFolder(tmp_path / "begun" / "progress").begin({})
    assert ready_made(tmp_path / "begun", replace(options, format="qdiff")) == tmp_path / "begun" / "cali.pth"
    assert [(own.outdir, own.resume) for own in calls] == [(tmp_path / "new", False), (tmp_path / "begun", True)]
    ready_made(tmp_path / "new", options)
    assert len(calls) == 2  # it was found


def test_going_on_measures_nothing(options, tmp_path, monkeypatch, caplog):
    own, save, measure, measured = replace(options, outdir=tmp_path, **LINEAR), ProgressFolder.save, run.measure, []

    def stop(self, number, *args):
        save(self, number, *args)
        raise KeyboardInterrupt

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    monkeypatch.setattr(ProgressFolder, "save", stop)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 steps done"):
        calibrate(own)
    monkeypatch.setattr(ProgressFolder, "save", save)
    assert len(measured) == 1
    with pytest.raises(ValueError, match=r"other settings: running_stat \(False there, True here\)"):
        calibrate(replace(own, running_stat=True, resume=True))
    assert len(measured) == 1  # settings are compared before
    file = tmp_path / "progress" / "measured.json"
    whole = file.read_text()
    own = replace(own, resume=True)
    for damage in ("", "[]", whole[:-1], whole.replace('"seconds"', '"second"'), whole.replace('"torch"', '"torc"')):
        file.write_text(damage)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "_learn", interrupt)
            calibrate(own)
        assert json.loads(file.read_text()).keys() == {"facts", "measured"}, damage  # measured anew, and kept
    assert len(measured) == 6
    with caplog.at_level("INFO"):
        target = calibrate(own)
    assert len(measured) == 6 and target.exists() and not file.parent.exists()
    assert "of it ranges" in caplog.text  # and the rest is told still


def test_what_was_measured_comes_back(options, tmp_path):
    """Of a calibration of all phases, and for all of its work, as for what is left of it."""
    own = replace(options, mixed_act=2.0, rounding="gptq", iters_w=None, samples_w=4)
    pipeline = Pipeline(find_model(own.model), device="cpu")
    qnn = QuantModel(pipeline.model.model.diffusion_model, own.quant_config())
    plan = DataPlan(samples=8, x=(qnn.model.in_channels, 4, 4), context=(5, qnn.model.context_dim), drawn=8, together=4)
    work = Workload(recon=own.recon_config(), batch_size=4, cache=10**9, mix=own.mix_config())
    measured = measure(qnn, plan, work)
    folder = ProgressFolder(tmp_path)
    folder.begin({})
    kept = Measurement(folder=folder, facts={"a": (1, 2)})
    kept.write(measured)
    found = kept.read(lambda found: covers(found, qnn, plan, work))
    assert found is not None and needs(qnn, plan, work, found) == needs(qnn, plan, work, measured)
    assert Measurement(folder=folder, facts={"a": (1, 3)}).read(lambda found: True) is None
    later = replace(work, finished=2)
    kept.write(measure(qnn, replace(plan, drawn=0), later))  # which does not cover all
    assert kept.read(lambda found: covers(found, qnn, replace(plan, drawn=0), later)) is not None
    assert kept.read(lambda found: covers(found, qnn, plan, later)) is None


def test_all_processes_have_looked_for_the_data_before_one_draws_it(options, tmp_path, monkeypatch):
    """Or one that looks later finds it there, and does not wait where the others do."""
    events = []
    for name in ("plan_data", "barrier", "calibration_data"):
        own = getattr(run, name)
        monkeypatch.setattr(run, name, lambda *args, name=name, own=own: events.append(name) or own(*args))
    calibrate(replace(options, outdir=tmp_path, **LINEAR))
    assert events[:3] == ["plan_data", "barrier", "calibration_data"]


def test_merging_is_noted(options, tmp_path):
    own = replace(options, outdir=tmp_path, merge=MergeOptions(ratio=0.5), **LINEAR)
    header = read_cali_header(calibrate(own))
    assert header.merge["ratio"] == 0.5 and header.calibration["quant_mode"] == "linear"
    assert json.loads((tmp_path / "report.json").read_text())["units"] == []


def test_reports_in_words():
    common = {"phase": "weights", "before": 2.0, "seconds": 1.5}
    reports = [
        UnitReport(unit="model.a", after=1.0, improved=True, **common),
        UnitReport(unit="model.b", after=2.0, improved=False, **common),
        UnitReport(unit="model.c", after=1.0, improved=True, **common),
    ]
    assert describe(reports[0]).split() == ["weights", "a", "2.000e+00", "->", "1.000e+00", "1.5", "s"]
    assert "(kept as it was)" in describe(reports[1])
    assert list(summary(reports)) == ["weights: 2 of 3 units improved, error x 0.50 (median), 4 s"]
    assert list(summary([])) == []
