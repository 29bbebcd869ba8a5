"""Samplers and guidance in a Pipeline: defaults, samples a step, batches, models that take guidance as an input."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest

import dsdiff
from dsdiff import DrawOptions, MergeOptions, ModelOptions, Pipeline, QuantizationOptions, find_model
from dsdiff.draw_settings import SAMPLERS as CLASSES
from dsdiff.options import FEW_STEP, SAMPLERS, STOCHASTIC
from dsdiff.record import BEFORE, USUAL_NAMES

TINY = DrawOptions(height=32, width=48, steps=4, vae="float32", precision="full")


@pytest.fixture(scope="module")
def pipeline(spec):
    return Pipeline(spec, device="cpu")


@contextmanager
def batches(pipeline):
    """The sizes of the UNet's batches within the block."""
    sizes = []
    hook = pipeline.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def pixels(picture):
    return np.asarray(picture.image).astype(int)


def test_the_tables_of_samplers_agree():
    assert tuple(CLASSES) == SAMPLERS == tuple(USUAL_NAMES)
    assert {name for name, kind in CLASSES.items() if kind.default_eta is not None} == set(STOCHASTIC)
    assert len({kind.name for kind in CLASSES.values()}) == len(SAMPLERS) == len(set(USUAL_NAMES.values()))
    assert (BEFORE["guidance_start"], BEFORE["guidance_stop"]) == (0, 1)


def test_defaults_are_those_of_the_sampler_or_of_the_model(pipeline, spec):
    etas = {"ddim": 0.0, "euler_a": 1.0, "tcd": 0.3}
    for name in SAMPLERS:
        settings = pipeline.resolve(DrawOptions(sampler=name))
        few = name in FEW_STEP
        assert (settings.steps, settings.scale) == ((4, 1.0) if few else (spec.steps, spec.scale)), name
        assert settings.eta == etas.get(name, 0.0), name
        assert pipeline.resolve(DrawOptions(sampler=name, scale=3.0)).scale == 3.0, name
        assert (settings.guidance_start, settings.guidance_stop) == (0.0, 1.0)
    assert pipeline.resolve(DrawOptions(sampler="tcd", eta=0.0)).eta == 0.0


def test_samples_a_step(pipeline):
    for name in SAMPLERS:
        first = 2 if name == "plms" else 1  # its first step calls the UNet twice
        with batches(pipeline) as sizes:
            list(pipeline.draw("a ring", options=replace(TINY, sampler=name)))
        per_step = 1 if name in FEW_STEP else 2
        assert sizes == [per_step] * (3 + first), name
        limited = replace(TINY, sampler=name, scale=3.0, guidance_start=0.25, guidance_stop=0.75)
        with batches(pipeline) as sizes:
            list(pipeline.draw(["a ring", "a star"], options=limited, batch_size=2))
        assert sizes == [2] * first + [4, 4, 2], name


def test_intervals_of_all_and_of_no_steps(pipeline):
    for name in ("ddim", "unipc", "lcm"):
        options = replace(TINY, sampler=name, scale=3.0)
        (full,), (none,) = (
            list(pipeline.draw("a ring", options=replace(options, scale=scale))) for scale in (3.0, 1.0)
        )
        (whole,) = pipeline.draw("a ring", options=replace(options, guidance_start=0.0, guidance_stop=1.0))
        (empty,) = pipeline.draw("a ring", options=replace(options, guidance_start=0.5, guidance_stop=0.5))
        (half,) = pipeline.draw("a ring", options=replace(options, guidance_stop=0.5))
        assert whole.image.tobytes() == full.image.tobytes() and empty.image.tobytes() == none.image.tobytes(), name
        assert len({picture.image.tobytes() for picture in (full, none, half)}) == 3, name


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    prompts, seeds = ["a red circle", "a blue star", "a ring"], [7, 8, 9]
    for name in SAMPLERS:
        options = replace(TINY, sampler=name, scale=2.0, guidance_stop=0.5)
        together = list(pipeline.draw(prompts, seeds=seeds, options=options, batch_size=3))
        alone = list(pipeline.draw(prompts, seeds=seeds, options=options))
        assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(together, alone, strict=True)), name
        assert together[0].image.tobytes() != together[1].image.tobytes(), name
        again = list(pipeline.draw(prompts, seeds=seeds, options=options, batch_size=3))
        assert [picture.image.tobytes() for picture in again] == [picture.image.tobytes() for picture in together], name


def test_options_without_effect_are_refused(pipeline):
    for values, said in (
        ({"guidance_start": 0.6, "guidance_stop": 0.4}, "they must lie in .0, 1., in this order"),
        ({"guidance_stop": 1.5}, "guidance_stop 1.5: they must lie"),
        ({"guidance_start": float("nan")}, "guidance_start is nan"),
        ({"guidance_stop": 0.5, "scale": 1}, "guidance_start and guidance_stop have no effect with scale 1"),
        ({"guidance_stop": 0.5, "sampler": "lcm"}, "no effect with lcm, which draws without guidance: give a scale"),
        ({"negative_prompt": "x", "sampler": "tcd"}, "a negative prompt has no effect with tcd, which draws without"),
        ({"sampler": "lcm", "eta": 0.5}, "eta 0.5 has no effect with lcm: leave it out, it is for ddim, euler_a, tcd"),
        ({"sampler": "lcm", "steps": 51}, r"1\.\.50, got 51"),
        ({"sampler": "unipc", "steps": 1000}, r"1\.\.999, got 1000"),
        ({"sampler": "heun"}, "sampler is 'heun': it must be one of ddim, plms, dpm_solver, euler, euler_a"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline.resolve(DrawOptions(**values))
    assert pipeline.resolve(DrawOptions(sampler="lcm", scale=2.0, guidance_stop=0.5, negative_prompt="x")).scale == 2.0


def test_lowered_models_embed_each_time_of_a_schedule_once(monkeypatch):
    """The cache knows all times at which a sampler calls, fractional ones too, and changes no picture."""
    pipeline = dsdiff.load("embedded", engine="simulate", device="cpu")
    unet, calls = pipeline.model.model.diffusion_model, []
    inner = getattr(unet, "model", unet)
    inner.time_embed.register_forward_hook(lambda *_: calls.append(1))
    for name in SAMPLERS:
        options = replace(TINY, sampler=name, scale=2.0, guidance_start=0.25, merge=MergeOptions(ratio=0.5))
        times = CLASSES[name](pipeline.model).schedule(4)
        inner.step_cache.clear()
        del calls[:]
        (kept,) = pipeline.draw("a ring", options=options)
        assert len(calls) == len({float(np.float32(time)) for time in times}), name
        with monkeypatch.context() as patch:
            patch.setattr("dsdiff.pipeline.step_cache.walk", lambda *_: nullcontext())
            (fresh,) = pipeline.draw("a ring", options=options)
        assert kept.image.tobytes() == fresh.image.tobytes(), name


# --- models that take guidance as an input -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lcm(make_small_model):
    """The options of a full LCM: the small model with an embedding of guidance."""
    config, ckpt = make_small_model("lcm", time_cond_proj_dim=16)
    return ModelOptions(config=config, ckpt=ckpt)


def test_a_full_lcm_draws_at_any_scale_with_one_sample_a_step(lcm):
    spec = find_model(lcm)
    pipeline, pictures = Pipeline(spec, device="cpu"), []
    assert spec.embeds_guidance and pipeline.resolve(replace(TINY, sampler="lcm")).scale == spec.scale != 1
    for scale in (None, 1.0, 7.0):
        with batches(pipeline) as sizes:
            prompts, options = ["a ring", "a star"], replace(TINY, sampler="lcm", scale=scale)
            pictures += list(pipeline.draw(prompts, seeds=[7, 8], options=options, batch_size=2))[:1]
        assert sizes == [2] * 4, scale
    assert len({picture.image.tobytes() for picture in pictures}) == 3
    (alone,) = pipeline.draw("a ring", seeds=[7], options=replace(TINY, sampler="lcm"))
    assert np.abs(pixels(alone) - pixels(pictures[0])).max() <= 1


def test_a_full_lcm_refuses_what_needs_a_second_sample_and_bits(lcm):
    spec = find_model(lcm)
    pipeline = Pipeline(spec, device="cpu")
    for options in (DrawOptions(sampler="lcm", negative_prompt="x"), DrawOptions(guidance_stop=0.5)):
        with pytest.raises(ValueError, match="no effect on a model that takes the scale as an input: leave it out"):
            pipeline.resolve(options)
    with pytest.raises(ValueError, match=r"cannot be quantized: quantize the model from which it was distilled"):
        Pipeline(spec, device="cpu", quantization=QuantizationOptions())
