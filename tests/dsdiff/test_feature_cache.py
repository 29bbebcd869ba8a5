"""Deep features kept from step to step, in a Pipeline: steps, engines, guidance, merging, and what is refused."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdiff import DrawOptions, MergeOptions, ModelOptions, Pipeline, QuantizationOptions, find_model
from dsdiff.models.registry import EMBEDDED
from dsdiff.record import BEFORE
from qdiff.engine.backends import onednn

OPTIONS = DrawOptions(height=64, width=64, steps=6, sampler="dpm_solver", vae="float32", precision="full")
ENGINES = {
    "float": None,
    "simulate": QuantizationOptions(engine="simulate"),
    **({"int8": QuantizationOptions(engine="int8")} if onednn.largest_exact_weight() else {}),
}


@pytest.fixture(scope="module", params=list(ENGINES))
def pipeline(request):
    spec = find_model(ModelOptions(config=Path(EMBEDDED)))
    return Pipeline(spec, device="cpu", quantization=ENGINES[request.param])


@contextmanager
def counted(pipeline):
    """How often the first and the middle block of the UNet run within the block."""
    settings = pipeline.resolve(OPTIONS)
    pipeline.prepare(settings)
    unet = pipeline.model.model.diffusion_model
    unet = getattr(unet, "model", unet)
    counts = {"first": 0, "middle": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [unet.input_blocks[0].register_forward_hook(count("first"))]
    hooks.append(unet.middle_block.register_forward_hook(count("middle")))
    yield counts
    for hook in hooks:
        hook.remove()


def drawn(pipeline, **changes):
    pictures = pipeline.draw(["a red circle", "a blue ring"], seeds=[1, 2], options=replace(OPTIONS, **changes))
    return [np.asarray(picture.image).astype(int) for picture in pictures]


def test_the_whole_unet_runs_in_every_nth_step(pipeline):
    plain = drawn(pipeline)
    for interval, whole in ((2, 3), (3, 2), (9, 1)):
        with counted(pipeline) as counts:
            pictures = drawn(pipeline, cache=interval)
        assert counts == {"first": 2 * 6, "middle": 2 * whole}, interval  # of two pictures
        difference = max(np.abs(ours - theirs).mean() for ours, theirs in zip(pictures, plain, strict=True))
        assert difference > 0, interval
    again = drawn(pipeline)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))  # nothing is left


def test_it_goes_with_guidance_in_some_steps_and_merged_tokens(pipeline):
    with counted(pipeline) as counts:
        first = drawn(pipeline, cache=2, cache_depth=2, guidance_stop=0.5, merge=MergeOptions(ratio=0.5))
    # Steps 0 and 2 are whole, step 3 has a smaller batch than step 2, step 4 is whole.
    assert counts == {"first": 2 * 6, "middle": 2 * 4}
    second = drawn(pipeline, cache=2, cache_depth=2, guidance_stop=0.5, merge=MergeOptions(ratio=0.5))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_what_cannot_be_is_refused(pipeline):
    for changes, says in (
        ({"cache": 0}, "cache is 0"),
        ({"cache_depth": 2}, "cache_depth has no effect"),
        ({"cache": 2, "cache_depth": 0}, "cache_depth is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(OPTIONS, **changes)
    with pytest.raises(ValueError, match="6 output blocks, so 5 at most"):  # before anything is read or drawn
        pipeline.resolve(replace(OPTIONS, cache=2, cache_depth=6))
    assert pipeline.spec.output_blocks == 6
    assert (BEFORE["cache"], BEFORE["cache_depth"]) == (1, 1)
