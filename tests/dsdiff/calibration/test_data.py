"""The data of a calibration, drawn with a small model."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from dsdiff.calibration import data as module
from dsdiff.calibration.data import calibration_data, plan_data
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions
from dsdiff.pipeline import Pipeline
from qdiff.calibration_set import CalibrationSet


@pytest.fixture(scope="module")
def pipeline(options):
    return Pipeline(find_model(options.model), device="cpu")


def test_the_data_holds_both_branches_of_each_step(pipeline, options, tmp_path):
    data = calibration_data(pipeline, replace(options, outdir=tmp_path))
    assert len(data) == 8 and data.x.shape[1:] == (4, 4, 4) and data.t.tolist() == [501] * 4 + [1] * 4
    # The first half of a call is without prompt: its contexts are all the same.
    without, red, blue = data.context[0], data.context[2], data.context[3]
    assert torch.equal(without, data.context[1]) and torch.equal(without, data.context[4])
    assert not torch.equal(red, without) and not torch.equal(red, blue) and torch.equal(red, data.context[6])
    # Both branches are given the same picture; those of the first step are noise of their own seeds.
    assert torch.equal(data.x[:2], data.x[2:4]) and not torch.equal(data.x[0], data.x[1])
    noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(options.seed + 1))
    assert torch.equal(data.x[1], noise)


def test_without_cond_only_the_branch_with_prompt_is_kept(pipeline, options, tmp_path):
    both = calibration_data(pipeline, replace(options, outdir=tmp_path))
    one = calibration_data(pipeline, replace(options, outdir=tmp_path, cond=False))
    assert torch.equal(one.x, both.x[[2, 3, 6, 7]]) and torch.equal(one.context, both.context[[2, 3, 6, 7]])
    free = replace(options, outdir=tmp_path, cond=False, draw=replace(options.draw, scale=1.0))
    assert len(calibration_data(pipeline, free)) == 4


def test_the_data_is_what_a_drawing_with_limited_guidance_sees(pipeline, options, tmp_path):
    draw = replace(options.draw, steps=4, sampler="euler_a", guidance_start=0.5)
    limited = replace(options, outdir=tmp_path, draw=draw, cali_st=4)
    data = calibration_data(pipeline, limited)
    times = [999.0, 666.0, 333.0, 0.0]
    assert data.t.tolist() == [t for t, samples in zip(times, (2, 2, 4, 4), strict=True) for _ in range(samples)]
    seen = []
    hook = pipeline.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    pipeline.sample(["a red circle", "a blue star"], [options.seed, options.seed + 1], pipeline.resolve(draw))
    hook.remove()
    assert torch.equal(data.x, torch.cat(seen)) and torch.equal(data.context[:2], data.context[-2:])
    assert data.facts["sampling"]["guidance_start"] == 0.5 and "guidance_stop" not in data.facts["sampling"]
    with_prompt = calibration_data(pipeline, replace(limited, cond=False))
    assert torch.equal(with_prompt.x, data.x[[0, 1, 2, 3, 6, 7, 10, 11]]) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="no guided step between --guidance_start and --guidance_stop there is no"):
        calibration_data(pipeline, replace(limited, draw=replace(draw, guidance_stop=0.5)))
    with pytest.raises(ValueError, match="with --scale 1 there is no branch"):
        calibration_data(pipeline, replace(limited, draw=DrawOptions(sampler="lcm")))


def test_batches_make_no_difference(pipeline, options, tmp_path, monkeypatch):
    one = replace(options, outdir=tmp_path / "one", cali_n=3, cond=False)
    data = calibration_data(pipeline, one)
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    parts = calibration_data(pipeline, replace(one, outdir=tmp_path / "parts"))
    assert len(data) == 6 and torch.equal(data.t, parts.t)
    assert torch.allclose(data.x, parts.x, atol=1e-4) and torch.equal(data.x[0], data.x[0])


def test_the_plan_is_of_the_data_to_come(pipeline, options, tmp_path):
    half = replace(options.draw, steps=4, guidance_start=0.5)
    for case, changes in enumerate(({}, {"cond": False}, {"draw": half, "cali_st": 4}, {"num_samples": 3})):
        own = replace(options, outdir=tmp_path / str(case), **changes)
        plan = plan_data(pipeline, own)
        calls = []
        hook = pipeline.model.model.diffusion_model.register_forward_pre_hook(lambda _, x, n=calls: n.append(len(x[0])))
        data = calibration_data(pipeline, own)
        hook.remove()
        assert plan.ready is None and plan.drawn == sum(calls), case
        assert (plan.samples, plan.x, plan.context) == (len(data), data.x.shape[1:], data.context.shape[1:]), case
        if case < 3:  # a part is chosen of the file
            (file,) = own.outdir.iterdir()
            assert plan.bytes_written == pytest.approx(file.stat().st_size, rel=0.05), case
        there = plan_data(pipeline, own)
        assert torch.equal(there.ready.x, data.x) and there.drawn == there.bytes_written == 0, case
        assert there.samples == len(data), case


def test_an_interrupted_drawing_goes_on_with_the_same_bytes(pipeline, options, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    whole = replace(options, outdir=tmp_path / "whole", cali_n=5)
    calibration_data(pipeline, whole)
    (file,) = whole.outdir.iterdir()
    own = replace(whole, outdir=tmp_path / "own")
    plain, drawn = pipeline.sample, []

    def sample(texts, seeds, settings):
        if len(drawn) == 2:
            drawn.append(None)
            raise KeyboardInterrupt
        drawn.append(seeds)
        return plain(texts, seeds, settings)

    monkeypatch.setattr(pipeline, "sample", sample)
    with pytest.raises(KeyboardInterrupt, match="4 of 5 pictures of the calibration data are drawn; the same command"):
        calibration_data(pipeline, own)
    assert plan_data(pipeline, own).drawn == 1 * 2 * 2  # a picture, two steps, both branches
    parts = sorted((own.outdir / file.name).with_suffix(".parts").iterdir())
    part = bytearray(parts[0].read_bytes())
    part[-1] ^= 4  # a bit that the disk turned over
    parts[0].write_bytes(part)
    (parts[0].parent / ".000004.safetensors.1.tmp").touch()  # a process was killed as it wrote
    calibration_data(pipeline, own)
    assert drawn == [[42, 43], [44, 45], None, [42, 43], [46]] and "is damaged and drawn anew" in caplog.text
    assert [path.name for path in own.outdir.iterdir()] == [file.name]
    assert (own.outdir / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_file_is_drawn_anew(pipeline, options, tmp_path, caplog):
    own = replace(options, outdir=tmp_path)
    calibration_data(pipeline, own)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 4])):  # cut, and with a bit turned over
        file.write_bytes(content)
        caplog.clear()
        assert plan_data(pipeline, own).ready is None and "drawn anew" in caplog.text
        calibration_data(pipeline, own)
        assert file.read_bytes() == whole


def test_pictures_that_become_infinite_are_named(pipeline, options, tmp_path):
    wild = replace(options, outdir=tmp_path, draw=replace(options.draw, scale=1e38))
    with pytest.raises(ValueError, match=r"calibration data, pictures 0 to 1: DDIM, step \d of 2: latents are NaN"):
        calibration_data(pipeline, wild)


def test_data_is_kept_and_found_again(pipeline, options, tmp_path, monkeypatch):
    own = replace(options, outdir=tmp_path)
    data = calibration_data(pipeline, own)
    (file,) = tmp_path.iterdir()
    # Its name is the hash of what it depends on. Those facts must not change, or kept files are not found any more.
    key = hashlib.sha256(json.dumps(data.facts, sort_keys=True).encode()).hexdigest()[:16]
    assert file.name == f"data-{key}.safetensors"
    sampling = {"height", "width", "sampler", "steps", "steps_taken", "eta", "scale", "negative_prompt", "precision"}
    assert data.facts.keys() == {"ckpt_sha256", "config_sha256", "prompts", "prompts_sha256", "sampling", "seed"} | {
        "cali_st",
        "cali_n",
        "cond",
        "device",
    }
    assert data.facts["sampling"].keys() == sampling

    def collect(*args):
        raise AssertionError("collected again")

    monkeypatch.setattr(module, "collect", collect)
    again = calibration_data(pipeline, own)
    assert torch.equal(data.x, again.x) and data.facts == again.facts
    for other in ({"seed": 1}, {"cali_n": 3}, {"cond": False}, {"draw": DrawOptions(steps=2)}):
        with pytest.raises(AssertionError, match="collected again"):
            calibration_data(pipeline, replace(own, **other))


def test_a_part_of_ready_data_is_drawn_by_the_seed(pipeline, options, tmp_path):
    data = calibration_data(pipeline, replace(options, outdir=tmp_path))
    (file,) = tmp_path.iterdir()
    ready = replace(options, data_path=file, prompts=None, cond=False, cali_st=None, cali_n=None, draw=DrawOptions())
    assert torch.equal(calibration_data(pipeline, ready).x, data.x)
    part = calibration_data(pipeline, replace(ready, num_samples=3))
    assert len(part) == 3 and all(any(torch.equal(x, y) for y in data.x) for x in part.x)
    parts = [calibration_data(pipeline, replace(ready, num_samples=3, seed=seed)).x for seed in range(4)]
    assert any(not torch.equal(parts[0], other) for other in parts[1:])


def test_what_cannot_be_is_refused(pipeline, options, tmp_path):
    CalibrationSet(torch.zeros(2, 4, 4, 4), torch.zeros(2), torch.zeros(2, 7, 9)).save(tmp_path / "other.safetensors")
    (tmp_path / "empty.txt").write_text("\n")
    ready = {"prompts": None, "cond": False, "cali_st": None, "cali_n": None, "draw": DrawOptions()}
    cases = [
        (ready | {"data_path": tmp_path / "other.safetensors"}, "a context of 9, the model 4 and 128"),
        (ready | {"data_path": tmp_path / "none.safetensors"}, "No such file"),
        ({"draw": DrawOptions(scale=1.0)}, "there is no branch without the prompt"),
        ({"prompts": tmp_path / "none.txt"}, "No such file"),
        ({"prompts": tmp_path / "empty.txt"}, "holds no prompts"),
        ({"prompts": None}, "no prompts are known for embedded shapes model: give --prompts FILE or --data_path FILE"),
    ]
    for values, says in cases:
        with pytest.raises((ValueError, OSError)) as error:
            calibration_data(pipeline, replace(options, outdir=tmp_path / "out", **values))
        assert says in str(error.value), (values, str(error.value))
    assert not (tmp_path / "out").exists()
