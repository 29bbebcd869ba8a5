"""What a calibration takes: the bytes in its folder, while other processes write there too."""

import os

from dsdiff.calibration.usage import Usage
from qdiff.capture import Cache


def test_files_and_those_of_the_cache_are_counted(tmp_path):
    (tmp_path / "before").write_bytes(bytes(100))
    cache = Cache(0, tmp_path / "cache")
    usage = Usage(tmp_path, cache)
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "step").write_bytes(bytes(30))
    cache.allocate((5,))
    cache.clear()
    usage.look()
    assert usage.disk == 30 + 20
    (tmp_path / "progress" / "step").unlink()
    usage.look()
    assert usage.disk == 30 + 20  # at most


def test_files_that_another_process_deletes_meanwhile_are_passed_over(tmp_path, monkeypatch):
    """As its activations between two units: gone before the first look at them, or before the second."""
    usage = Usage(tmp_path, Cache(0, tmp_path / "cache"))
    for name in ("kept", "gone", "gone too"):
        (tmp_path / name).write_bytes(bytes(10))
    stat, lstat, looked = os.stat, os.lstat, set()

    def vanishing(plain, path, *args, **kwargs):
        name = os.path.basename(path) if isinstance(path, str | os.PathLike) else ""
        if name == "gone too" or name in looked:
            (tmp_path / name).unlink(missing_ok=True)
        elif name == "gone":
            looked.add(name)
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: vanishing(stat, *args, **kwargs))
    monkeypatch.setattr(os, "lstat", lambda *args, **kwargs: vanishing(lstat, *args, **kwargs))
    usage.look()
    usage.look()
    assert usage.disk in (10, 20) and not (tmp_path / "gone").exists() and not (tmp_path / "gone too").exists()
