"""What a calibration needs, by its estimate and in fact."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from dsdiff.calibration import measure as measuring
from dsdiff.calibration import run
from dsdiff.calibration.data import DataPlan
from dsdiff.calibration.disk import step_bytes
from dsdiff.calibration.measure import Sizes, measure_pass
from dsdiff.calibration.needs import Workload, gptq_bytes, left_steps, measure, needs
from dsdiff.calibration.peak import TensorPeak
from dsdiff.calibration.usage import Usage
from dsdiff.models.spec import find_model
from dsdiff.pipeline import Pipeline
from qdiff.calibrate import Step
from qdiff.config import MixConfig, ReconConfig
from qdiff.gptq import EXACT
from qdiff.quant_model import QuantModel

ADAROUND = ReconConfig(iters_w=50, iters_a=0)
WORK = Workload(recon=ADAROUND, batch_size=4, cache=10**9)


@pytest.fixture(scope="module")
def qnn(options):
    pipeline = Pipeline(find_model(options.model), device="cpu")
    return QuantModel(pipeline.model.model.diffusion_model, options.quant_config())


@pytest.fixture(scope="module")
def plan(qnn):
    return DataPlan(samples=8, x=(qnn.model.in_channels, 8, 8), context=(5, qnn.model.context_dim))


# --- by measurements ---------------------------------------------------------------------------------------


def test_each_phase_is_counted(qnn, plan):
    """No times are compared but those that follow from one measurement."""
    for recon, phases in (
        (ADAROUND, {"fitting", "weights", "ranges", "writing"}),
        (ReconConfig(rounding="gptq", iters_a=3), {"fitting", "weights", "ranges", "activations", "writing"}),
        (None, {"fitting", "ranges", "writing"}),
    ):
        work = replace(WORK, recon=recon)
        measured = measure(qnn, plan, work)
        expected = needs(qnn, plan, work, measured)
        assert set(expected.phases) == phases and all(seconds > 0 for seconds in expected.phases.values())
        assert expected.seconds == pytest.approx(sum(expected.phases.values()))
        drawn = needs(qnn, replace(plan, drawn=7, together=4), work, replace(measured, drawing=measured.weights))
        assert drawn.seconds - expected.seconds == pytest.approx(7 * measured.weights.seconds)
        resumed = needs(qnn, plan, replace(work, finished=1), measured)
        assert expected.seconds - resumed.seconds == pytest.approx(measured.fitting)
        assert expected.disk - resumed.disk == step_bytes(qnn, Step(phase="fitting"))  # which is there already
        if recon is ADAROUND:
            longer = needs(qnn, plan, replace(work, recon=replace(recon, iters_w=100)), measured)
            steps = sum(each.seconds for each in measured.learning.values())
            assert longer.seconds - expected.seconds == pytest.approx(50 * steps)
            assert longer.memory == expected.memory and longer.disk == expected.disk


def test_mixing_is_counted(qnn, plan):
    work = replace(WORK, recon=None, mix=MixConfig(samples=3, probes=2))
    measured = measure(qnn, plan, work)
    mixed, plain = needs(qnn, plan, work, measured), needs(qnn, plan, replace(work, mix=None), measured)
    passes = measured.weights.seconds + 2 * measured.probe.seconds
    statics = sum(not quantizer.is_set for quantizer in qnn.act_quantizers().values())
    assert mixed.phases["mixing"] == pytest.approx(3 * passes + statics * measured.ranges)
    assert "mixing" not in plain.phases and mixed.memory >= plain.memory
    layers = sum(4 * layer.weight.numel() for layer in qnn.layers().values())
    assert measured.probe.memory > layers  # all weights as floats, which gradients need


def test_data_is_measured_in_the_precision_in_which_it_is_drawn(qnn, plan):
    work = replace(WORK, recon=None)
    assert measure(qnn, plan, work).drawing is None
    half = replace(plan, drawn=4, together=4, precision="autocast")
    seen = []
    hook = qnn.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    measured = measure(qnn, half, work)
    hook.remove()
    assert measured.drawing is not None and any(seen) and not all(seen)


def test_measuring_leaves_the_model_as_it_was(qnn, plan):
    before = {name: value.clone() for name, value in qnn.state_dict().items()}
    states = {name: (type(each), each.enabled) for name, each in qnn.named_modules() if hasattr(each, "enabled")}
    measure(qnn, plan, replace(WORK, recon=ReconConfig(iters_w=2, iters_a=2)))
    after = qnn.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)) for name, value in after.items())
    modules = {name: (type(each), each.enabled) for name, each in qnn.named_modules() if hasattr(each, "enabled")}
    assert modules == states and not any(each._forward_hooks for each in qnn.modules())


def test_few_samples_tell_the_memory_of_many_in_a_large_model(qnn, plan, monkeypatch):
    expected, passed = measure_pass(qnn, plan, 8), []
    monkeypatch.setattr(measuring, "SLOW", 0.0)
    hook = qnn.register_forward_pre_hook(lambda module, args: passed.append(len(args[0])))
    found = measure_pass(qnn, plan, 8)
    hook.remove()
    assert passed == [2, 4, 4] and found.samples == 8
    assert found.memory == pytest.approx(expected.memory, rel=0.02) and found.begins.keys() == expected.begins.keys()


def test_what_does_not_fit_into_the_cache_goes_to_disk(qnn, plan, monkeypatch):
    plan = replace(plan, samples=10**4)  # whose activations are more than the file
    measured = measure(qnn, plan, WORK)
    units = [step.unit for step in left_steps(qnn, WORK) if step.phase == "weights"]
    most = 10**4 * max(measured.sizes.unit_bytes(unit) for unit in units)
    whole, none = (needs(qnn, plan, replace(WORK, cache=cache), measured) for cache in (most, 0))
    assert whole.memory - none.memory == most
    assert none.disk > most > whole.disk
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process of a machine has a cache
    two = needs(qnn, plan, replace(WORK, cache=most - 10**6), measured)
    assert two.disk == max(whole.disk, none.disk - most + 2 * 10**6) and two.memory == 2 * (whole.memory - 10**6)


def test_gptq_needs_memory_for_its_samples_and_its_largest_hessian():
    def sizes(layer_bytes, columns):
        return Sizes(inputs={}, outputs={}, skip_bytes=1000, places=[1, 2], layer_bytes=layer_bytes, columns=columns)

    assert gptq_bytes(sizes([10, 300], [3, 100]), 7) == 7 * 1600 + 8 * 7 * 2 * 100 + 20 * 100**2
    assert gptq_bytes(sizes([10, 300], [3, EXACT + 1]), 7) == 7 * 1600 + 8 * 7 * 2 * (EXACT + 1) + 12 * (EXACT + 1) ** 2
    wide = sizes([10**9, 300], [3, EXACT + 1])  # the widest layer is not the largest
    assert gptq_bytes(wide, 7) == 7 * (1000 + 2 * 10**9) + 8 * 7 * 3 + 20 * 9


# --- in fact -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_and_disk_are_those_of_a_calibration(options, tmp_path, monkeypatch):
    """Tensors at a time, by their own sizes, and files at a time, within 20 %: the same on any machine."""
    plain = {"rounding": "nearest", "iters_w": None, "iters_a": 0, "no_grad_ckpt": False}
    for case, changes in {
        "adaround": {},
        "gptq": {"rounding": "gptq", "iters_w": None, "samples_w": 8},
        "files": {"cache_gb": 0.0, "cali_n": 8},
        "qdiff": {**plain, "format": "qdiff"},
        "mixed": {**plain, "mixed_act": 2.0},
    }.items():
        told, used = [], []
        with ExitStack() as stack, monkeypatch.context() as patch:
            peak = TensorPeak()
            check_needs, look = run._check_needs, Usage.look

            def check(*args, stack=stack, peak=peak, check_needs=check_needs):
                measured = check_needs(*args)
                stack.enter_context(peak)
                return measured

            def watch(self, used=used, look=look):
                look(self)
                used.append(self.disk)

            patch.setattr(run, "_check_needs", check)
            patch.setattr(run, "check_estimate", lambda expected, *_, told=told: told.append(expected))
            patch.setattr(Usage, "look", watch)
            run.calibrate(replace(options, outdir=tmp_path / case, **changes))
        (expected,) = told
        assert expected.disk == pytest.approx(max(used), rel=0.2), case
        assert expected.memory == pytest.approx(peak.most, rel=0.2), case


def test_peaks_are_those_of_tensors():
    kept = torch.zeros(1000)
    with TensorPeak() as peak:
        a = torch.zeros(1000)  # 4,000 bytes
        view = a.view(10, 100)
        view.add_(1)
        kept.mul_(2)
        b = a + kept.view(-1)
        del a, view
        c = b * 2
    assert c.sum() == 2000
    assert (peak.most, peak.held) == (8000, 8000)
    w = torch.ones(1000, requires_grad=True)
    with TensorPeak() as peak:
        (w * w).exp().sum().backward()
        w.grad = None
    assert peak.held == 0 and 12000 <= peak.most <= 28000  # products and gradients
