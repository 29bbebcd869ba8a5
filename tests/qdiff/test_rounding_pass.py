"""The pass in which GPTQ rounds a model: what each layer is rounded from, and that it can be taken up again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff import ReconConfig
from qdiff.calibrate import calibrate, calibration_steps, step_work
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache, capture
from qdiff.checkpoint import save_cali_ckpt
from qdiff.gptq import InputStatistics, output_of, round_layer
from qdiff.quant_layer import QuantModule
from qdiff.quant_state import load_tensors, weight_tensors
from qdiff.quantizers import FrozenQuantizer
from qdiff.resume import ProgressFolder
from qdiff.rounding_pass import round_units

CONFIG = ReconConfig(rounding="gptq", iters_a=0, samples_w=6)
LATE = "model.output_blocks.3.0.skip_connection"


@pytest.fixture(scope="module")
def data():
    tensors = load_file(Path(__file__).resolve().parents[1] / "goldens" / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])


@pytest.fixture
def rounded(make_qnn, data):
    """(config) -> a model whose weights are rounded, and the reports of its units."""

    def make(config=CONFIG):
        qnn = make_qnn(quant_act=False, scale_method="mse")
        qnn.fit_weights()
        reports = []
        round_units(qnn, data, config, on_unit=reports.append)
        return qnn, reports

    return make


def codes(qnn):
    return {name: quantizer.codes(None) for name, quantizer in qnn.weight_quantizers().items()}


def share_of_equal(one, other):
    equal = sum(int((one[name] == other[name]).sum()) for name in one)
    return equal / sum(values.numel() for values in one.values())


@torch.no_grad()
def test_all_units_are_rounded_in_order_and_eps_is_closer_than_with_nearest(rounded, make_qnn, data):
    qnn, reports = rounded()
    assert [report.unit for report in reports] == list(qnn.units())
    assert all(report.phase == "weights" and report.after <= report.before for report in reports)
    assert sum(report.improved for report in reports) > len(reports) / 2
    assert all(isinstance(quantizer, FrozenQuantizer) for quantizer in qnn.weight_quantizers().values())
    arguments = data.batch(slice(0, 6), torch.device("cpu"))
    exact = qnn(*arguments)  # the state is as before: off
    nearest = make_qnn(quant_act=False, scale_method="mse")
    nearest.fit_weights()
    errors = []
    for model in (qnn, nearest):
        model.set_quant_state(True, False)
        errors.append(float((model(*arguments) - exact).square().mean()))
    assert errors[0] < 0.7 * errors[1]


@torch.no_grad()
def test_a_layer_is_rounded_from_the_inputs_that_the_model_quantized_so_far_makes(rounded, make_qnn, data, tmp_path):
    for sym in (False, True):
        qnn, _ = rounded(ReconConfig(rounding="gptq", samples_w=6, sym=sym))
        fresh = make_qnn(quant_act=False, scale_method="mse")
        fresh.fit_weights()
        before = {name: tensor for name, tensor in weight_tensors(qnn).items() if not name.startswith(LATE)}
        layer = fresh.layers()[LATE]
        (exact,) = capture(fresh, layer, data, 6, Cache(10**9, tmp_path))
        load_tensors(fresh, before | {n: t for n, t in weight_tensors(qnn).items() if n.startswith(LATE)}, weights=True)
        layer.weight_quantizer, layer.weight_quantizer_0 = (
            quantizer for name, quantizer in make_fitted(make_qnn).items() if name.startswith(LATE)
        )
        with fresh.quant_state(True, False):
            (inexact,) = capture(fresh, layer, data, 6, Cache(10**9, tmp_path))
        assert not torch.equal(exact, inexact)
        statistics = InputStatistics(layer, targets=not sym)
        statistics.add(exact if sym else inexact, None if sym else output_of(layer, exact, layer.weight))
        round_layer(layer, statistics, damp=0.01, act_order=True)
        ours = {name: values for name, values in codes(qnn).items() if name.startswith(LATE)}
        theirs = {name: values for name, values in codes(fresh).items() if name.startswith(LATE)}
        assert share_of_equal(ours, theirs) > 0.99, sym


def make_fitted(make_qnn):
    qnn = make_qnn(quant_act=False, scale_method="mse")
    qnn.fit_weights()
    return qnn.weight_quantizers()


@torch.no_grad()
def test_every_setting_makes_a_difference(rounded):
    plain = codes(rounded()[0])
    for settings in ({"samples_w": 3}, {"damp": 1.0}, {"act_order": False}, {"sym": True}):
        config = ReconConfig(**{"rounding": "gptq", "samples_w": 6, **settings})
        assert share_of_equal(plain, codes(rounded(config)[0])) < 0.999, settings
    assert share_of_equal(plain, codes(rounded()[0])) == 1


def test_the_model_is_put_together_again_after_an_interruption(make_qnn, data):
    qnn = make_qnn(quant_act=False, scale_method="mse")
    qnn.fit_weights()
    before = {name: type(module) for name, module in qnn.named_modules() if not name.endswith("quantizer")}
    seen = []

    def interrupt(report):
        seen.append(report.unit)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        round_units(qnn, data, CONFIG, on_unit=interrupt)
    after = {name: type(module) for name, module in qnn.named_modules() if not name.endswith("quantizer")}
    assert {n: kind for n, kind in after.items() if "quantizer" not in n} == {
        n: kind for n, kind in before.items() if "quantizer" not in n
    }
    frozen = [name for name, unit in qnn.units().items() if all_frozen(unit)]
    assert frozen == seen == list(qnn.units())[:4]
    assert not any(quantizer.enabled for quantizer in qnn.weight_quantizers().values())


def all_frozen(unit):
    layers = [module for module in unit.modules() if isinstance(module, QuantModule)]
    return all(isinstance(getattr(layer, name), FrozenQuantizer) for layer in layers for name in layer.weight_parts())


def test_an_interrupted_pass_taken_up_ends_with_the_same_file(make_qnn, data, tmp_path, monkeypatch):
    plain, saved = ProgressFolder.save, []

    def whole(folder):
        qnn = make_qnn(scale_method="mse")
        options = {"cache": Cache(10**9, tmp_path / "cache"), "batch_size": 4, "folder": folder}
        done = []
        steps = list(calibrate(qnn, data, CONFIG, progress=lambda step, n: done.append((step, n)), **options))
        assert [step for step, _ in steps] == calibration_steps(qnn, CONFIG)
        assert all(report["unit"] == step.unit for step, report in steps)
        work = {step: sum(n for other, n in done if other == step) for step, _ in done}
        assert all(n == step_work(step, CONFIG, len(data), layers=len(qnn.layers())) for step, n in work.items())
        save_cali_ckpt(qnn, tmp_path / "cali.safetensors")
        return (tmp_path / "cali.safetensors").read_bytes()

    def save(self, number, *args):
        plain(self, number, *args)
        saved.append(number)
        if len(saved) in (3, 10):
            raise KeyboardInterrupt

    uninterrupted = whole(None)
    folder = ProgressFolder(tmp_path / "progress")
    folder.begin({"seed": 1})
    monkeypatch.setattr(ProgressFolder, "save", save)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            whole(folder)
    last = sorted(folder.folder.glob("step-*"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1  # a bit that the disk turned over
    last.write_bytes(content)
    assert whole(folder) == uninterrupted
    assert saved[:10] == list(range(10)) and saved[10:] == list(range(9, len(saved) - 1))  # the damaged one twice


def test_nearest_has_no_steps_for_weights(make_qnn):
    qnn = make_qnn()
    assert [step.phase for step in calibration_steps(qnn, ReconConfig(rounding="nearest", iters_a=0))] == [
        "fitting",
        "ranges",
    ]
    phases = [step.phase for step in calibration_steps(qnn, ReconConfig(rounding="gptq", iters_w=0, iters_a=0))]
    assert phases == ["fitting"] + ["weights"] * len(qnn.units()) + ["ranges"]


def test_fewer_samples_than_processes_are_refused(make_qnn, data, monkeypatch):
    qnn = make_qnn(quant_act=False)
    qnn.fit_weights()
    monkeypatch.setattr("qdiff.rounding_pass.world_size", lambda: 7)
    with pytest.raises(ValueError, match="6 samples are too few for 7 processes"):
        round_units(qnn, data, CONFIG)
