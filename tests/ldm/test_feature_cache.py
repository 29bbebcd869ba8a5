"""Deep features kept for some steps: what is computed when, and that nothing else changes."""

import pytest
import torch

from ldm.modules.diffusionmodules.feature_cache import cached_features, every
from ldm.modules.diffusionmodules.openaimodel import UNetModel


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 8, "num_res_blocks": 1}
    blocks = {"attention_resolutions": (1, 2), "channel_mult": (1, 2), "num_heads": 2, "norm_groups": 2}
    model = UNetModel(**sizes, **blocks, use_spatial_transformer=True, context_dim=6).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also those that begin with zeros
            parameter.normal_(std=0.2)
    return model


def inputs(time, batch=2, height=8, width=8):
    generator = torch.Generator().manual_seed(int(time))
    x, context = (
        torch.randn(batch, 4, height, width, generator=generator),
        torch.randn(batch, 3, 6, generator=generator),
    )
    return x, torch.full((batch,), time), context


@torch.no_grad()
def by_hand(unet, deep, x, t, context, depth):
    """The outer blocks on deep features: written out once more."""
    emb = unet.embed_time(t, x.dtype)
    skips, h = [], x
    for block in unet.input_blocks[:depth]:
        h = block(h, emb, context)
        skips.append(h)
    h = deep
    for block in unet.output_blocks[len(unet.output_blocks) - depth :]:
        h = block(torch.cat([h, skips.pop()], dim=1), emb, context, size=skips[-1].shape[2:] if skips else None)
    return unet.out(h)


@torch.no_grad()
def deep_features(unet, x, t, context, depth):
    """What enters the first of the outer output blocks, beside its skip connection."""
    seen = []
    block = unet.output_blocks[len(unet.output_blocks) - depth]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unet(x, t, context)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_steps_between_whole_ones_compute_the_outer_blocks_alone(unet):
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, block in [("middle", unet.middle_block), ("in0", unet.input_blocks[0]), ("out", unet.out)]
    ]
    for depth, size in ((1, (8, 8)), (2, (8, 8)), (3, (7, 10))):
        plain = {time: unet(*inputs(time, 2, *size)) for time in (900.0, 700.0, 500.0, 300.0)}
        calls.clear()
        with cached_features(unet, every(3), depth):
            got = {time: unet(*inputs(time, 2, *size)) for time in plain}
        assert calls == ["in0", "middle", "out", "in0", "out", "in0", "out", "in0", "middle", "out"]
        assert torch.equal(got[900.0], plain[900.0]) and torch.equal(got[300.0], plain[300.0])
        whole = deep_features(unet, *inputs(900.0, 2, *size), depth)
        width = whole.shape[1] - skip_width(unet, depth)
        for time in (700.0, 500.0):
            expected = by_hand(unet, whole[:, :width], *inputs(time, 2, *size), depth)
            assert torch.equal(got[time], expected) and not torch.equal(got[time], plain[time])
    for hook in hooks:
        hook.remove()


def skip_width(unet, depth):
    """Channels of the skip connection that enters the first of the outer output blocks."""
    x, t, context = inputs(1.0)
    emb, h = unet.embed_time(t, x.dtype), x
    for block in unet.input_blocks[:depth]:
        h = block(h, emb, context)
    return h.shape[1]


@torch.no_grad()
def test_calls_at_one_time_are_one_step_and_another_batch_is_computed(unet):
    whole = []
    hook = unet.middle_block.register_forward_hook(lambda *_: whole.append(len(_[2])))
    with cached_features(unet, every(2)):
        for time, batch in ((9.0, 2), (9.0, 2), (8.0, 2), (8.0, 2), (7.0, 2), (6.0, 1), (5.0, 1), (4.0, 1)):
            unet(*inputs(time, batch))
    hook.remove()
    # 9 is whole in both calls, 8 in none, 7 whole; at 6 the batch is another one; 5 is whole, and 4 is not.
    assert whole == [2, 2, 2, 1, 1]


@torch.no_grad()
def test_every_step_whole_changes_nothing(unet):
    plain = [unet(*inputs(time)) for time in (9.0, 8.0, 7.0)]
    with cached_features(unet, every(1)):
        kept = [unet(*inputs(time)) for time in (9.0, 8.0, 7.0)]
    assert all(map(torch.equal, plain, kept))


def test_what_cannot_be_is_refused(unet):
    for interval in (0, -1):
        with pytest.raises(ValueError, match="cache is"):
            every(interval)
    for depth in (0, 4, 9):
        with pytest.raises(ValueError, match="cache_depth is"), cached_features(unet, every(2), depth):
            pass
    again = cached_features(unet, every(2))
    with pytest.raises(ValueError, match="cached already"), cached_features(unet, every(2)), again:
        pass
    assert unet.feature_cache is None
