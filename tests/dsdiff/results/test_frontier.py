"""The comparison of ways to merge tokens: its figures against their definitions, and what is not done twice."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dsdiff.benchmark.figures import Spread
from dsdiff.metrics.eps_errors import EpsErrors, recorded
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions
from dsdiff.pipeline import Pipeline
from dsdiff.results.frontier import report, run, timing
from dsdiff.results.frontier.figures import Eps, Pictures, Row, Time, frontier
from dsdiff.results.frontier.options import MERGING, STEPS, FrontierOptions, read_candidates

TINY = DrawOptions(height=32, width=48, steps=3, sampler="dpm_solver", vae="float32", precision="full")
PROMPTS = ["a red circle", "a blue star", "a ring"]


@pytest.fixture
def options(small_model, tmp_path):
    config, ckpt = small_model
    settings, prompts = tmp_path / "settings.yaml", tmp_path / "prompts.txt"
    settings.write_text(
        "settings:\n- {name: half, ratio: 0.5}\n"
        "- {name: 'later, kv', ratio: 0, merge_schedule: '0.3:0.75', merge_kv: true}\n"
    )
    prompts.write_text("\n".join(PROMPTS))
    return FrontierOptions(
        settings=settings,
        parts=("eps", "pictures", "time"),
        prompts=prompts,
        model=ModelOptions(config=config, ckpt=ckpt),
        draw=TINY,
        n=3,
        batch_size=2,
        calls=2,
        repeats=2,
        outdir=tmp_path / "out",
        device="cpu",
    )


# --- error of eps ------------------------------------------------------------------------------------------


def test_errors_are_those_of_calls_with_the_latents_of_unmerged_pictures(options):
    """Against calls of the UNet by hand: conditional and unconditional apart, one picture at a time."""
    pipeline = Pipeline(find_model(options.model), device="cpu")
    settings = pipeline.resolve(options.draw)
    merge = MergeOptions(ratio=0.5, use_rand=False)
    found = EpsErrors(pipeline, settings, PROMPTS, 7, 2).of(replace(settings, merge=merge), "half")
    assert found.shape == (3, 3) and found.dtype == torch.float64 and (found > 0).all()
    model = pipeline.prepare(settings)
    for i, prompt in enumerate(PROMPTS):
        with recorded(model.model.diffusion_model, 1) as calls:
            pipeline.sample([prompt], [7 + i], settings)
        for step, x in enumerate(calls.inputs):
            t = torch.full((1,), 999 * (1 - step / 3))
            eps = []
            for options_of_call in (None, merge):
                model = pipeline.prepare(pipeline.resolve(DrawOptions(merge=options_of_call)))
                with torch.no_grad():
                    contexts = model.get_learned_conditioning(["", prompt])
                    e_u, e_c = (model.apply_model(x[:1], t, context[None]).double() for context in contexts)
                eps.append(e_u + settings.scale * (e_c - e_u))
            expected = (eps[0] - eps[1]).square().mean().item()
            # Squares of differences that are a thousandth of the outputs: rounding shows in the third digit.
            assert math.isclose(found[i, step], expected, rel_tol=5e-3), (prompt, step)


def test_before_a_schedule_begins_there_is_no_error(options):
    pipeline = Pipeline(find_model(options.model), device="cpu")
    settings = pipeline.resolve(options.draw)
    errors = EpsErrors(pipeline, settings, PROMPTS, 0, 2)
    later = replace(settings, merge=MergeOptions(ratio=0.0, merge_schedule="0.5:0.5"))
    first = errors.of(later, "later")
    assert (first[:, :2] == 0).all() and (first[:, 2] > 0).all()
    assert torch.equal(errors.of(later, "again"), first)
    assert (errors.of(replace(settings, merge=MergeOptions(ratio=0.0)), "none") == 0).all()


def test_what_is_recorded_leaves_no_hooks(options):
    pipeline = Pipeline(find_model(options.model), device="cpu")
    unet = pipeline.model.model.diffusion_model
    with pytest.raises(RuntimeError), recorded(unet, 1):
        raise RuntimeError
    assert not unet._forward_hooks and not unet._forward_pre_hooks


# --- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread(monkeypatch):
    """Timings use all cores; here they are no measurements."""
    monkeypatch.setattr("dsdiff.benchmark.comparison.usable_cores", lambda: 1)


def test_figures_are_those_of_the_pictures_and_are_kept(options, one_thread, monkeypatch):
    costs = run.compare(options)
    assert [row.name for row in costs.rows] == ["half", "later, kv"]
    pictures = {
        name: np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(float)
        for name in ("base", "half", "later__kv")
        for folder in (options.outdir / "pictures").glob(f"{name}-*")
    }
    for row, name in zip(costs.rows, ("half", "later__kv"), strict=True):
        errors = ((pictures[name] - pictures["base"]) ** 2).reshape(3, -1).mean(1)
        own = -10 * np.log10(errors[errors > 0] / 255**2)
        assert math.isclose(row.pictures.psnr, -10 * math.log10(errors.mean() / 255**2), abs_tol=1e-9)
        assert row.pictures.pairs == len(own)
        assert math.isclose(row.pictures.mean, own.mean()) and len(row.eps.by_call) == 3
        assert math.isclose(row.pictures.error, own.std(ddof=1) / len(own) ** 0.5)
        assert math.isclose(row.eps.mse, np.mean(row.eps.by_call)) and len(row.time.own) == 2
    assert costs.rows[1].eps.by_call[0] == 0 < costs.rows[0].eps.by_call[0]

    def fail(*_, **__):
        raise AssertionError("measured again")

    for place in ("EpsErrors.of", "timing.side_by_side", "DrawTask.draw"):
        monkeypatch.setattr(f"dsdiff.results.frontier.run.{place}", fail)
    assert run.compare(options).to_dict()["rows"] == costs.to_dict()["rows"]
    report.write([costs], options.outdir, "merging")
    content = json.loads((options.outdir / "merging.json").read_text())["comparisons"][0]
    assert content["rows"][0]["changes"]["merge"]["ratio"] == 0.5 and content["rows"][0]["speed"]["median"] > 0
    table = (options.outdir / "merging.md").read_text()
    assert table.count("\n| ") + table.startswith("| ") == 3 and "later, kv" in table
    assert Image.open(options.outdir / "merging.png").size[0] == 15 * 120


def test_a_way_that_changes_nothing_has_equal_pictures(options):
    options.settings.write_text("settings:\n- {name: none, ratio: 0}\n")
    costs = run.compare(FrontierOptions(**{**vars(options), "parts": ("pictures",)}))
    assert costs.rows[0].pictures == Pictures(psnr=None, mean=None, error=None, pairs=0)
    assert costs.rows[0].eps is None and costs.rows[0].time is None
    assert report.cells(costs.rows[0]) == ["-", "equal", "-", "-", "-"] and frontier(costs.rows) == []
    report.write([costs], options.outdir, "merging")
    timed = replace(costs, rows=[replace(costs.rows[0], time=Time(own=[1.0], base=[2.0]))])
    report.write([timed], options.outdir, "merging")
    assert "2.000" in (options.outdir / "merging.md").read_text()
    assert not (options.outdir / "merging.png").exists()  # there is nothing to draw against the time


# --- time --------------------------------------------------------------------------------------------------


def test_calls_are_spread_over_the_steps_and_the_order_alternates():
    log = []

    class Running:
        def __init__(self, way, calls):
            self.way, self.calls = way, calls

        def __enter__(self):
            return lambda i: log.append((self.way, i, self.calls))

        def __exit__(self, *_):
            pass

    times = timing.side_by_side(Running, "own", "base", torch.device("cpu"), calls=3, repeats=2)
    own, base = ([(way, i, 3) for i in range(3)] for way in ("own", "base"))
    assert log == [*own[:2], *base[:2], *own, *base, *base, *own]
    assert [len(seconds) for seconds in times] == [2, 2]


def test_the_unet_that_is_timed_merges_and_is_left_as_it_was(options):
    pipeline = Pipeline(find_model(options.model), device="cpu")
    running, base = timing.of_pipeline(pipeline), pipeline.resolve(options.draw)
    with running(base, 2) as call:
        plain = [call(0), call(1)]
    merged = pipeline.resolve(replace(options.draw, merge=MergeOptions(merge_schedule="0:0,0.5:0.5")))
    with running(merged, 2) as call:
        first, second = call(0), call(1)
    assert torch.equal(first, plain[0]) and not torch.equal(second, plain[1]) and first.shape == (2, 4, 4, 6)
    with running(base, 2) as call:
        assert torch.equal(call(0), plain[0])


def test_steps_are_timed_as_a_picture_has_them(options):
    """Batches by guidance, and whole steps by the cache; nothing is kept afterwards."""
    pipeline = Pipeline(find_model(options.model), device="cpu")
    running, whole = timing.of_pipeline(pipeline), []
    own = pipeline.resolve(replace(options.draw, steps=6, guidance_stop=0.5, cache=2))
    hook = pipeline.model.model.diffusion_model.middle_block.register_forward_hook(lambda *_: whole.append(len(_[2])))
    with running(own, 6) as call:
        assert [len(call(i)) for i in range(6)] == [2, 2, 2, 1, 1, 1]
    assert whole == [2, 2, 1, 1]  # steps 0, 2, 3 (of another batch) and 4
    with running(pipeline.resolve(options.draw), 3) as call:
        assert [len(call(i)) for i in range(3)] == [2, 2, 2]
    hook.remove()
    assert len(whole) == 7 and timing.follows_steps(own) and not timing.follows_steps(pipeline.resolve(options.draw))


def test_ways_that_leave_work_out_are_compared(options, one_thread):
    options.settings.write_text(
        "settings:\n- {name: all}\n- {name: half, guidance_stop: 0.5}\n- {name: cache, cache: 2}\n"
        "- {name: chosen, whole: 0.5}\n"
    )
    options.prompts.write_text("a red circle\na blue star\na small green circle\n")
    more = {"draw": replace(TINY, steps=4), "parts": ("eps", "attributes", "time"), "calls": None}
    options = FrontierOptions(**{**vars(options), **more})
    costs = run.compare(replace(options, model=options.model))
    by_name = {row.name: row for row in costs.rows}
    assert by_name["all"].eps.mse == 0 and by_name["all"].changes == {}
    assert by_name["half"].eps.by_call[:2] == [0, 0] and min(by_name["half"].eps.by_call[2:]) > 0
    assert by_name["cache"].eps.by_call[0] == by_name["cache"].eps.by_call[2] == 0 < by_name["cache"].eps.by_call[1]
    (schedule,) = (options.outdir / "schedules").glob("chosen-*.json")
    assert len(json.loads(schedule.read_text())["whole"]) == 2
    assert all(row.attributes.n == by_name["all"].attributes.n > 0 for row in costs.rows)
    report.write([costs, costs], options.outdir, "steps")
    table = (options.outdir / "steps.md").read_text()
    assert table.count("| 4 steps |") == 2 and "chosen" in table
    with pytest.raises(ValueError, match="'half' steps are unlike, so all 4 are timed"):
        run.compare(replace(options, calls=3, names=["half"]))


# --- settings, frontier ------------------------------------------------------------------------------------


def test_the_frontier_has_what_no_other_beats_in_both():
    def row(name, speed, mse, psnr=None):
        eps = None if mse is None else Eps(mse=mse, error=0.0, by_call=[mse])
        pictures = None if psnr is None else Pictures(psnr=psnr, mean=psnr, error=0.0, pairs=2)
        return Row(
            name=name, changes={}, eps=eps, pictures=pictures, time=Time(own=[1.0, 2.0], base=[speed, 2 * speed])
        )

    rows = [row("a", 1.5, 3.0), row("b", 1.2, 1.0), row("c", 1.3, 4.0), row("d", 1.2, 2.0), row("e", 1.0, 0.5)]
    assert frontier(rows) == ["e", "b", "a"]
    assert rows[0].time.speed == Spread(median=1.5, min=1.5, max=1.5)
    assert frontier([row("x", 1.1, None, 20.0), row("y", 1.2, None, 21.0)]) == ["y"]
    assert frontier([Row(name="z", changes={}, eps=rows[0].eps)]) == []


def test_the_shipped_settings_are_read_and_can_be_chosen_by_name():
    steps = {candidate.name: candidate for candidate in read_candidates(STEPS)}
    assert steps["chosen 1/2"].whole == 0.5 and steps["cache 3, depth 2"].drawing == {"cache": 3, "cache_depth": 2}
    found = read_candidates(MERGING)
    assert len({candidate.name for candidate in found}) == len(found) > 15
    assert any(candidate.merge == MergeOptions(ratio=0.5) for candidate in found)
    assert [each.name for each in read_candidates(MERGING, ["0.5", "0.3"])] == ["0.3", "0.5"]


def test_settings_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    with pytest.raises(FileNotFoundError):
        read_candidates(path)
    for text, says in (
        ("settings: 3", "must be a list of entries with a name"),
        ("settings:\n- {ratio: 0.5}", "must be a list of entries with a name"),
        ("settings:\n- {name: a, ratio: 2}", "ratio is 2"),
        ("settings:\n- {name: a, speed: 2}", "'a' has speed"),
        ("settings:\n- {name: a}\n- {name: a}", "a name of its own"),
        ("settings: []", "a name of its own"),
        ("]", "must be a list"),
        ("settings:\n- {name: a, whole: 2}", "whole is 2"),
        ("settings:\n- {name: a, whole: 0.5, cache: 2}", "leave out one of them"),
        ("settings:\n- {name: a, cache: 0}", "cache is 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_candidates(path)
    with pytest.raises(ValueError, match="have no 'b'"):
        read_candidates(MERGING, ["b"])
    for bad, says in (
        ({"n": 1}, "n is 1"),
        ({"parts": ()}, "parts is"),
        ({"parts": ("speed",)}, "parts is"),
        ({"time_of": "sd-v2"}, "time_of is 'sd-v2'"),
    ):
        with pytest.raises(ValueError, match=says):
            FrontierOptions(**bad)
