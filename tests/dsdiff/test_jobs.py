"""Jobs: pictures that are there stay, missing ones are drawn, whichever process draws them."""

import hashlib

import pytest
from PIL import Image

from dsdiff import DrawOptions, ModelOptions, Pipeline, find_model, jobs
from qdiff import distributed

PROMPTS = ["a red circle", "a blue star", "a green heart", "a pink ring", "a white cross"]
SEEDS = [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def pipeline(small_model):
    config, ckpt = small_model
    return Pipeline(find_model(ModelOptions(config=config, ckpt=ckpt)), device="cpu")


@pytest.fixture
def draw(pipeline):
    settings = pipeline.resolve(DrawOptions(height=32, width=32, sampler="dpm_solver", steps=2))

    def call(folder, build=lambda: pipeline):
        jobs.draw_missing(build, PROMPTS, SEEDS, paths_in(folder), settings, 2, "pictures")
        return folder

    return call


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def paths_in(folder):
    return [folder / f"{i:05}.png" for i in range(len(PROMPTS))]


def test_each_picture_holds_its_prompt_and_seed(draw, tmp_path):
    for path, prompt, seed in zip(paths_in(draw(tmp_path / "whole")), PROMPTS, SEEDS, strict=True):
        with Image.open(path) as picture:
            assert picture.size == (32, 32)
            assert picture.info == {"prompt": prompt, "seed": str(seed)}


def test_an_interrupted_run_ends_with_the_same_pictures(draw, tmp_path):
    whole = draw(tmp_path / "whole")
    before = hashes(whole)
    kept = paths_in(whole)[1].stat().st_mtime_ns
    for i in (0, 4):
        paths_in(whole)[i].unlink()
    draw(whole)
    assert hashes(whole) == before
    assert paths_in(whole)[1].stat().st_mtime_ns == kept
    draw(whole, build=lambda: pytest.fail("a model was built though nothing is missing"))


def test_processes_share_the_batches(draw, tmp_path, monkeypatch):
    whole = draw(tmp_path / "whole")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(len(hashes(draw(tmp_path / "shared"))))
    assert shares == [3, 5]  # batches of 2, 2, 1
    assert hashes(tmp_path / "shared") == hashes(whole)
