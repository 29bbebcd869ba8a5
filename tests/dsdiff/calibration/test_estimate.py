"""What there is for a calibration, and estimates that do not fit."""

from types import SimpleNamespace

import pytest
import torch

from dsdiff.calibration import estimate as module
from dsdiff.calibration.estimate import available_memory, check_estimate, check_gpu, duration, size
from dsdiff.calibration.needs import Estimate

CPU = torch.device("cpu")


def test_too_little_memory_or_disk_is_refused(tmp_path, monkeypatch, caplog):
    expected = Estimate(phases={"weights": 90, "activations": 31}, memory=2**31, disk=2**30)
    monkeypatch.setattr(module, "available_memory", lambda: 2**31)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**31))
    with caplog.at_level("INFO", "dsdiff"):
        check_estimate(expected, tmp_path / "not" / "there", CPU)
    assert [record.message for record in caplog.records] == [
        "about 2 min, 2.0 GiB more memory (2.0 GiB available), 1.0 GiB of disk (2.0 GiB free)",
        "of it weights 90 s, activations 31 s",
    ]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    with pytest.raises(ValueError, match=r"1\.0 GiB of disk are needed in .* and 0\.5 GiB are free"):
        check_estimate(expected, tmp_path, CPU)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**31))
    monkeypatch.setattr(module, "available_memory", lambda: 2**30)
    with pytest.raises(ValueError, match=r"2\.0 GiB more memory are needed and 1\.0 GiB are available"):
        check_estimate(expected, tmp_path, CPU)


def test_times_and_sizes_in_words():
    for seconds, words in ((0.123, "0.12 s"), (42.4, "42 s"), (200, "3 min"), (3 * 3600, "3.0 h")):
        assert duration(seconds) == words
    for count, words in ((2**20, "1.0 MiB"), (2**31, "2.0 GiB")):
        assert size(count) == words


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
