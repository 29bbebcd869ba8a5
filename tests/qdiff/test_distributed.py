"""Work that processes share: its parts, the lock of its folder, and how restarted processes wait for it."""

import threading

import pytest

from ldm.fileio import only_run_in
from qdiff import distributed
from qdiff.distributed import only_work_in, own_share


def test_shares_are_a_partition_in_order(monkeypatch):
    for size in (1, 2, 5, 9):
        monkeypatch.setattr(distributed, "world_size", lambda size=size: size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(own_share(range(7)))
        assert [list(share) for share in shares] == [[i for i in range(7) if i % size == rank] for rank in range(size)]


def test_a_folder_is_for_one_work_at_a_time(tmp_path):
    folder, refused = tmp_path / "new", pytest.raises(ValueError, match="another run is writing")
    with only_work_in(folder), refused, only_work_in(folder):
        pass
    assert not (tmp_path / "new").exists()
    with only_work_in(tmp_path / "new"):  # free again
        pass


def test_restarted_processes_wait_for_those_before_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    held = threading.Event()

    def hold():
        with only_run_in(tmp_path):
            held.set()
            threading.Event().wait(0.2)

    earlier = threading.Thread(target=hold)
    earlier.start()
    assert held.wait(5)
    with only_work_in(tmp_path):
        pass
    monkeypatch.setattr(distributed, "PATIENCE", 0)
    with only_run_in(tmp_path), pytest.raises(ValueError, match="another run"), only_work_in(tmp_path):
        pass
