"""What a calibration needs, and what there is."""

from types import SimpleNamespace

import pytest
import torch

from dsdiff.calibration import estimate as module
from dsdiff.calibration.estimate import Estimate, Measured, available_memory, check_estimate, check_gpu, estimate
from dsdiff.models.spec import find_model
from dsdiff.pipeline import Pipeline
from qdiff.calibration_set import CalibrationSet
from qdiff.config import MixConfig, ReconConfig
from qdiff.gptq import EXACT
from qdiff.quant_model import QuantModel

CPU = torch.device("cpu")


def test_what_does_not_fit_into_the_cache_goes_to_disk():
    expected = Estimate(seconds=1, activations=100, memory=0)
    assert (expected.on_disk(30), expected.on_disk(100), expected.on_disk(200)) == (70, 0, 0)


def test_too_little_memory_or_disk_is_refused(tmp_path, monkeypatch):
    expected = Estimate(seconds=90, activations=2**31, memory=2**31)
    monkeypatch.setattr(module, "available_memory", lambda: 2**31)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    check_estimate(expected, 2**31, tmp_path / "not" / "there", CPU)
    with pytest.raises(ValueError, match=r"2\.0 GiB of disk are needed in .* and 1\.0 are free"):
        check_estimate(expected, 0, tmp_path, CPU)
    monkeypatch.setattr(module, "available_memory", lambda: 2**30)
    with pytest.raises(ValueError, match=r"2\.0 GiB more memory are needed and 1\.0 are available"):
        check_estimate(expected, 2**31, tmp_path, CPU)


def test_each_process_of_a_machine_has_a_cache(tmp_path, monkeypatch):
    expected = Estimate(seconds=90, activations=2**31, memory=0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_estimate(expected, 2**30, tmp_path, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"1\.0 GiB of disk"):
        check_estimate(expected, 2**30, tmp_path, CPU)


def test_too_little_gpu_memory_is_refused():
    check_gpu(needed=2**30, free=2**30)
    with pytest.raises(ValueError, match=r"2\.0 GiB more of the GPU's memory are needed and 1\.0 are available"):
        check_gpu(needed=2**31, free=2**30)


def test_a_container_limits_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert available_memory() == 5000
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, available in (("max\n", 5000), ("4000\n", 3000), ("9000\n", 5000)):
        (tmp_path / "memory.max").write_text(limit)
        assert available_memory() == available, limit


def test_gptq_needs_memory_for_its_samples_and_its_largest_hessian():
    sizes = {"seconds": 1.0, "unit_bytes": [1], "places": [1], "skip_bytes": 1000}
    small = Measured(layer_bytes=[10, 300], columns=[3, 100], **sizes)
    large = Measured(layer_bytes=[10, 300], columns=[3, EXACT + 1], **sizes)
    assert small.gptq_bytes(7) == 7 * 1600 + 20 * 100**2
    assert large.gptq_bytes(7) == 7 * 1600 + 12 * (EXACT + 1) ** 2
    wide = Measured(layer_bytes=[10**9, 300], columns=[3, EXACT + 1], **sizes)  # the widest layer is not the largest
    assert wide.gptq_bytes(7) == 7 * (1000 + 2 * 10**9) + 20 * 9


def test_the_estimate_counts_each_phase(options, monkeypatch):
    """With one measurement for all, so that nothing depends on the machine's load but the speed of GPTQ's products."""
    pipeline = Pipeline(find_model(options.model), device="cpu")
    qnn = QuantModel(pipeline.model.model.diffusion_model, options.quant_config())
    unet = qnn.model
    x, context = torch.randn(8, unet.in_channels, 8, 8), torch.randn(8, 5, unet.context_dim)
    data = CalibrationSet(x, torch.arange(8.0), context)
    measured = module._measure(qnn, data, 4)
    monkeypatch.setattr(module, "_measure", lambda *_: measured)
    needs = {
        rounding: estimate(qnn, data, ReconConfig(rounding=rounding, iters_w=50, iters_a=0), 4, 10**9)
        for rounding in ("adaround", "gptq", "nearest")
    }
    mixed = estimate(qnn, data, ReconConfig(rounding="nearest", iters_a=0), 4, 10**9, MixConfig(samples=3, probes=2))
    extra = mixed.seconds - needs["nearest"].seconds
    assert extra == pytest.approx(measured.seconds * 3 * (1 + 3 * 2)) and mixed.memory == needs["nearest"].memory
    assert needs["nearest"].seconds < needs["adaround"].seconds
    assert needs["nearest"].seconds < needs["gptq"].seconds
    assert needs["gptq"].activations == needs["nearest"].activations == 0 < needs["adaround"].activations
    assert needs["gptq"].memory > needs["nearest"].memory
