"""What a calibration needs, and what there is."""

from types import SimpleNamespace

import pytest
import torch

from dsdiff.calibration import estimate as module
from dsdiff.calibration.estimate import Estimate, available_memory, check_estimate, check_gpu

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
