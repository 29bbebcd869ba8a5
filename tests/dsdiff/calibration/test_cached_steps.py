"""Schedules of cached steps: errors against calls by hand, and the choice against all schedules there are."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from dsdiff.cache_schedule import CacheSchedule
from dsdiff.calibration import cached_steps
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, ModelOptions
from dsdiff.pipeline import Pipeline

TINY = DrawOptions(height=32, width=32, steps=5, sampler="dpm_solver", vae="float32", precision="full")
PROMPTS = ["a red circle", "a ring"]


@pytest.fixture
def pipeline(small_model):
    config, ckpt = small_model
    return Pipeline(find_model(ModelOptions(config=config, ckpt=ckpt)), device="cpu")


def search(longest=10, depth=1, seed=3):
    return cached_steps.Search(prompts=PROMPTS, seed=seed, batch_size=2, depth=depth, longest=longest)


def measured(pipeline, options, **limits):
    return cached_steps.measure(pipeline, pipeline.resolve(options), search(**limits))


@torch.no_grad()
def test_errors_are_those_of_one_step_on_features_of_an_earlier_one(pipeline):
    """Against a UNet that is called twice by hand: at step i as a whole, and at step j on what it kept."""
    table = measured(pipeline, TINY)
    settings = pipeline.resolve(TINY)
    model = pipeline.prepare(settings)
    unet, calls = model.model.diffusion_model, []
    hook = unet.register_forward_pre_hook(lambda _, args, more: calls.append((*args, *more.values())), with_kwargs=True)
    pipeline.sample(PROMPTS, [3, 4], settings)
    hook.remove()
    deep = len(unet.output_blocks) - 1
    for i, j in ((0, 1), (0, 4), (1, 3), (2, 3)):
        kept = []
        hook = unet.output_blocks[deep].register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        unet(*calls[i])
        exact = unet(*calls[j])
        hook.remove()
        skip = unet.input_blocks[0](calls[j][0], None, None)
        emb = unet.embed_time(calls[j][1], torch.float32)
        width = kept[0].shape[1] - skip.shape[1]
        own = unet.out(unet.output_blocks[deep](torch.cat([kept[0][:, :width], skip], 1), emb, calls[j][2], size=None))
        (u, c), (other_u, other_c) = own.chunk(2), exact.chunk(2)
        difference = (u - other_u) + settings.scale * ((c - other_c) - (u - other_u))
        assert table[i, j] == pytest.approx(difference.double().square().mean().item(), rel=1e-3), (i, j)
    assert (np.tril(table) == 0).all() and (table[np.triu_indices(5, 1)] > 0).all()


def test_features_are_not_kept_for_long_nor_over_an_end_of_guidance(pipeline):
    table = measured(pipeline, TINY, longest=3)
    finite = {(i, j) for i in range(5) for j in range(i, 5) if np.isfinite(table[i, j])}
    assert finite == {(i, j) for i in range(5) for j in range(i, 5) if j - i < 3}
    table = measured(pipeline, replace(TINY, guidance_stop=0.6))  # steps 0, 1 and 2 are guided
    assert {(i, j) for i in range(5) for j in range(i, 5) if np.isfinite(table[i, j])} == {
        (i, j) for i in range(5) for j in range(i, 5) if (i < 3) == (j < 3)
    }
    plms = measured(pipeline, replace(TINY, sampler="plms"))  # which calls the UNet twice in a step
    assert plms.shape == (5, 5) and np.isfinite(plms).all()


def test_the_choice_is_the_best_of_all_schedules():
    generator = np.random.default_rng(0)
    for n, most in ((1, 9), (6, 9), (7, 3)):
        table = np.triu(generator.random((n, n)), 1)
        table[np.subtract(*np.indices((n, n))[::-1]) >= most] = np.inf
        best = {}
        for count in range(n):
            for later in combinations(range(1, n), count):
                whole = (0, *later)
                error = sum(table[max(i for i in whole if i <= step), step] for step in range(n)) / n
                if error < best.get(len(whole), (np.inf,))[0]:
                    best[len(whole)] = (error, whole)
        choices = cached_steps.choose(table)
        assert [(len(each.whole), each.whole) for each in choices] == [(k, best[k][1]) for k in sorted(best)]
        assert [each.error for each in choices] == pytest.approx([best[k][0] for k in sorted(best)], abs=1e-12)
        assert choices[-1].error == 0


def test_weights_are_the_noise_that_steps_remove(pipeline):
    """Against the times that the UNet is called at. PLMS calls it twice in its second step."""
    for sampler, calls in (("ddim", 5), ("plms", 6)):
        settings = pipeline.resolve(replace(TINY, sampler=sampler))
        times = []
        unet = pipeline.prepare(settings).model.diffusion_model
        hook = unet.register_forward_pre_hook(lambda _, args, times=times: times.append(int(args[1][0])))
        pipeline.sample(PROMPTS, [3, 4], settings)
        hook.remove()
        alpha_bar = pipeline.model.alphas_cumprod.double()[list(dict.fromkeys(times))].numpy()
        sigma = [*np.sqrt((1 - alpha_bar) / alpha_bar), 0]
        weights = cached_steps.weights(pipeline, settings)
        assert len(times) == calls and weights == pytest.approx(-5 * np.diff(sigma) / sigma[0], rel=1e-6), sampler


def test_the_goal_picks_a_schedule():
    plain = {"sampler": "ddim", "steps": 3, "guidance": None, "depth": 1}
    choices = [
        CacheSchedule(**plain, whole=tuple(range(k)), error=error) for k, error in ((1, 0.5), (2, 0.25), (3, 0.0))
    ]
    for goal, count in (({"error": 0.5}, 1), ({"error": 0.3}, 2), ({"error": 0.0}, 3), ({"whole": 2}, 2)):
        assert len(cached_steps.pick(choices, **goal).whole) == count, goal
    with pytest.raises(ValueError, match="no schedule has 4 whole steps: 1 to 3 can be had"):
        cached_steps.pick(choices, whole=4)


def test_a_schedule_is_drawn_with_and_refused_elsewhere(pipeline, tmp_path):
    settings = pipeline.resolve(TINY)
    found = cached_steps.schedules(pipeline, settings, search(longest=9, seed=0))
    chosen = cached_steps.pick(found, whole=3)
    path = tmp_path / "new" / "cache.json"
    cached_steps.write(chosen, path)
    assert CacheSchedule.read(path) == chosen
    own = pipeline.resolve(replace(TINY, cache=path))
    assert (own.cache, own.cache_depth) == (chosen.whole, 1) and own.keeps_features
    runs = []
    hook = pipeline.model.model.diffusion_model.middle_block.register_forward_hook(lambda *_: runs.append(1))
    cached = pipeline.sample(PROMPTS, [0, 1], own)
    hook.remove()
    assert len(runs) == 3 and not torch.equal(cached, pipeline.sample(PROMPTS, [0, 1], settings))
    for changes, says in (
        ({"steps": 6}, "was made for steps 5, and this is 6"),
        ({"sampler": "euler"}, "was made for sampler dpm_solver, and this is euler"),
        ({"guidance_stop": 0.5}, "guidance in all steps, and this is from 0 to 0.5"),
        ({"scale": 1.0}, "guidance in all steps, and this is none"),
    ):
        with pytest.raises(ValueError, match=says):
            pipeline.resolve(replace(TINY, cache=path, **changes))
    for depth in (0, 99):
        with pytest.raises(ValueError, match=f"cache_depth is {depth}"):
            cached_steps.schedules(pipeline, settings, search(depth=depth))
    with pytest.raises(ValueError, match="longest is 1"):
        search(longest=1)
    with pytest.raises(ValueError, match="leave --cache out"):
        cached_steps.schedules(pipeline, own, search())
