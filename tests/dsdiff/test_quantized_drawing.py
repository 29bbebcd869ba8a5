"""The embedded model in few bits: contexts of any length, and drawing from pictures with all that is faster."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsdiff
from dsdiff import DrawOptions, InitOptions, MergeOptions
from dsdiff.models.cuda_graph import GraphedUNet
from dsdiff.models.held import HeldModel
from ldm.modules.encoders.chunks import PromptStyle
from qdiff.engine import step_cache

LONG = "a red circle left of a blue star, " * 4 + "on green"
OPTIONS = DrawOptions(height=64, width=64, steps=4, vae="float32", precision="full")
SAMPLES = Path(__file__).parents[2] / "docs/samples.png"


@pytest.fixture(scope="module")
def pipelines():
    return {engine: dsdiff.load("embedded", engine=engine, device="cpu") for engine in ("int8", "simulate")}


def array(picture):
    return np.asarray(picture.image).astype(int)


@pytest.mark.slow
def test_integers_take_contexts_of_any_length(pipelines):
    """They draw what simulated integers draw, for prompts of one chunk and of several, in turn and in one batch."""
    prompts, seeds = ["a ring", LONG, "a red circle BREAK a star", "a ring"], [1, 2, 3, 1]
    drawn = {
        engine: [*map(array, each.draw(prompts, seeds=seeds, options=OPTIONS))] for engine, each in pipelines.items()
    }
    for i, prompt in enumerate(prompts):
        assert np.abs(drawn["int8"][i] - drawn["simulate"][i]).mean() < 2, prompt
    assert (drawn["int8"][0] == drawn["int8"][3]).all()
    together = list(pipelines["int8"].draw(prompts, seeds=seeds, options=OPTIONS, batch_size=4))
    for i, picture in enumerate(together):
        assert np.abs(array(picture) - drawn["int8"][i]).mean() < 2, prompts[i]


@pytest.mark.slow
def test_results_of_a_context_are_kept_for_each_length(pipelines):
    model = pipelines["int8"].model
    encoder, unet = model.cond_stage_model, model.model.diffusion_model
    contexts = [encoder.encode_chunks([encoder.chunks(text, PromptStyle())]) for text in ("a ring", LONG, "a star")]
    assert len({context.shape[1] for context in contexts}) == 2
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        expected = [unet(x, t, context=context) for context in contexts]
        with step_cache.walk(unet, [500]):
            for _ in range(2):
                for context, plain in zip(contexts, expected, strict=True):
                    assert torch.equal(unet(x, t, context=context), plain)


@pytest.mark.slow
def test_pictures_are_drawn_from_pictures_with_all_that_is_faster(pipelines):
    start = Image.open(SAMPLES).convert("RGB").crop((0, 0, 64, 64))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    options = replace(
        OPTIONS,
        steps=8,
        merge=MergeOptions(ratio=0.5, proportional=True),
        cache=2,
        init=InitOptions(strength=0.5, mask_blur=0),
    )
    pipeline = pipelines["int8"]
    (picture,) = pipeline.img2img(f"a (red:1.2) circle, {LONG}", start, mask=mask, options=options)
    own = np.asarray(start).astype(int)
    assert (array(picture)[:, 32:] == own[:, 32:]).all() and np.abs(array(picture)[:, :32] - own[:, :32]).mean() > 1
    assert picture.settings.steps_taken == 4


def test_recorded_calls_are_drawn_with_and_kept(pipelines, monkeypatch):
    """On a CPU a GraphedUNet records nothing, but is called all the same."""
    (expected,) = pipelines["int8"].draw("a ring", seeds=[1], options=OPTIONS)
    monkeypatch.setattr(HeldModel, "_can_be_recorded", True)
    pipeline = dsdiff.load("embedded", engine="int8", device="cpu")
    unet, calls = pipeline.model.model.diffusion_model, []
    monkeypatch.setattr(GraphedUNet, "can_replay", lambda self, x: calls.append(self))
    for _ in range(2):
        (picture,) = pipeline.draw("a ring", seeds=[1], options=OPTIONS)
        assert (array(picture) == array(expected)).all()
        assert pipeline.model.model.diffusion_model is unet
    assert len(calls) == 2 * OPTIONS.steps and len(set(map(id, calls))) == 1
    with pytest.raises(KeyboardInterrupt), pipeline.recorded() as called:
        assert called is calls[0]
        raise KeyboardInterrupt
    assert pipeline.model.model.diffusion_model is unet
    with pipelines["simulate"].recorded() as called:
        assert called is pipelines["simulate"].model.model.diffusion_model
