"""scripts/drawing.py: what is there stays, what is missing is drawn, whoever draws it."""

import hashlib

import pytest
from PIL import Image

from dsdiff import jobs as drawing

PROMPTS = ["a red circle", "a blue star", "a green heart", "a pink ring", "a white cross"]
SEEDS = [3, 4, 5, 6, 7]


@pytest.fixture
def build(small_model):
    config, ckpt = small_model
    flags = ["--config", str(config), "--ckpt", str(ckpt), "--device", "cpu", "--H", "32", "--W", "32"]

    def build():
        model, _, options = drawing.model_of([*flags, "--dpm_solver", "--ddim_steps", "2"])
        return model, options

    return build


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def paths_in(folder):
    return [folder / f"{i:05}.png" for i in range(len(PROMPTS))]


@pytest.fixture
def whole(build, tmp_path):
    drawing.draw_missing(build, PROMPTS, SEEDS, paths_in(tmp_path / "whole"), 2, "whole")
    return tmp_path / "whole"


def test_each_picture_holds_its_prompt_and_seed(whole):
    for path, prompt, seed in zip(paths_in(whole), PROMPTS, SEEDS, strict=True):
        with Image.open(path) as picture:
            assert picture.size == (32, 32)
            assert picture.info == {"prompt": prompt, "seed": str(seed)}


def test_an_interrupted_run_ends_with_the_same_pictures(build, whole, tmp_path):
    before = hashes(whole)
    kept = paths_in(whole)[1].stat().st_mtime_ns
    for i in (0, 4):
        paths_in(whole)[i].unlink()
    drawing.draw_missing(build, PROMPTS, SEEDS, paths_in(whole), 2, "again")
    assert hashes(whole) == before
    assert paths_in(whole)[1].stat().st_mtime_ns == kept


def test_nothing_is_built_if_nothing_is_missing(whole):
    def build():
        raise AssertionError("built")

    drawing.draw_missing(build, PROMPTS, SEEDS, paths_in(whole), 2, "again")


def test_processes_share_the_batches(build, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(drawing, "rank", lambda rank=rank: rank)
        drawing.draw_missing(build, PROMPTS, SEEDS, paths_in(tmp_path / "shared"), 2, "share")
        shares.append(len(hashes(tmp_path / "shared")))
    assert shares == [3, 5]  # batches of 2, 2, 1
    assert hashes(tmp_path / "shared") == hashes(whole)
