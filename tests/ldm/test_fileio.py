"""Atomic writing, the file hash, and the check of a folder before work begins."""

import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import fileio
from ldm.fileio import (
    check_writable,
    file_sha256,
    hash_ahead,
    only_run_in,
    write_atomically,
    write_errors_naming,
    write_folder_atomically,
)


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomically(str(path), lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    """Each library has its own error for it; a limit on the size of files makes them as a full disk does."""
    import resource

    array = torch.arange(100_000.0)
    writers = {
        "text": lambda path: path.write_text("a" * 400_000),
        "safetensors": lambda path: save_file({"a": array}, path),
        "torch": lambda path: torch.save({"a": array}, path),
        "numpy": lambda path: np.savez(path.open("wb"), array.numpy()),
        "png": lambda path: Image.effect_noise((600, 600), 50).save(path, format="PNG"),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                write_atomically(tmp_path / name, write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.filename == str(tmp_path / name) and caught.value.strerror, name
        assert os.listdir(tmp_path) == [], name


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    folder = tmp_path / "new" / "outputs"
    hold = "import sys; sys.path.insert(0, sys.argv[1])\nfrom ldm.fileio import only_run_in\n"
    hold += "with only_run_in(sys.argv[2]):\n    print('in', flush=True); sys.stdin.read()"
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(root), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="another run is writing to"), only_run_in(folder):
        pass
    other.kill()  # the lock ends with the process
    other.wait()
    with only_run_in(folder):
        assert os.listdir(folder) == []
    with pytest.raises(OSError, match="no such model"), only_run_in(tmp_path / "a" / "b"):
        raise OSError("no such model")
    assert os.listdir(tmp_path) == ["new"]  # empty folders are not left behind, nor is one that was there removed
    with only_run_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_folder_that_another_run_removes_as_it_ends_is_made_anew(tmp_path, monkeypatch):
    """Between its being opened and locked: the lock would be on a folder that is not there."""
    flock, calls = fcntl.flock, []

    def late(handle, how):
        if not calls:
            (tmp_path / "out").rmdir()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_run_in(tmp_path / "out"):
        (tmp_path / "out" / "file").touch()
        with pytest.raises(ValueError, match="another run is writing to"), only_run_in(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").exists()


def test_errors_about_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "file", lambda path: path.write_bytes((tmp_path / "missing").read_bytes()))
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(RuntimeError, match="shapes"), write_errors_naming(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    def private(temporary):
        temporary.touch(mode=0o600)

    for umask, mode in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(umask)
        try:
            write_atomically(tmp_path / "file", private)
            write_folder_atomically(tmp_path / oct(umask), lambda folder: private(folder / "file"))
            assert os.umask(umask) == umask  # left as it was
        finally:
            os.umask(before)
        for path in (tmp_path / "file", tmp_path / oct(umask) / "file"):
            assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_atomically(tmp_path / "missing" / "file", Path.touch)


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    hashed, sha256 = [], fileio._sha256
    monkeypatch.setattr(fileio, "_sha256", lambda file: hashed.append(file.name) or sha256(file))
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"abc")
    link.symlink_to(path)
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [file_sha256(name) for name in (path, str(path), link)] == [expected] * 3
    assert len(hashed) == 1
    path.write_bytes(b"abcd")  # another size
    assert file_sha256(path) == hashlib.sha256(b"abcd").hexdigest()
    path.write_bytes(b"abce")
    os.utime(path, ns=(1, 1))  # another time
    assert file_sha256(path) == hashlib.sha256(b"abce").hexdigest()
    assert len(hashed) == 3


def test_a_file_that_is_hashed_ahead_is_hashed_once(tmp_path, monkeypatch):
    begun, asked, hashed, sha256 = threading.Event(), threading.Event(), [], fileio._sha256

    def slowly(file):
        begun.set()
        assert asked.wait(60)
        return hashed.append(file.name) or sha256(file)

    monkeypatch.setattr(fileio, "_sha256", slowly)
    monkeypatch.setattr(fileio, "PIECE", 2)  # so that it takes several
    (tmp_path / "file").write_bytes(b"abcde")
    hash_ahead([tmp_path / "missing", tmp_path / "file"])
    assert begun.wait(60)
    threading.Timer(0.05, asked.set).start()
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abcde").hexdigest()
    assert hashed == ["file"]


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory"):
        check_writable(tmp_path / "file" / "folder")
    check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == ["file"]
