"""Token merging on real diffusers models with small random weights, and against the published tomesd package."""

import copy
import importlib.util
import sys
from importlib import metadata
from itertools import product

import pytest
import torch

import tomesd

diffusers = pytest.importorskip("diffusers")
attention = pytest.importorskip("diffusers.models.attention")
processors = pytest.importorskip("diffusers.models.attention_processor")

CONTEXT = 12  # width of the prompt embeddings


def make_unet(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": CONTEXT,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        }
        return diffusers.UNet2DConditionModel(**(options | kwargs)).eval()


@pytest.fixture
def unet():
    return make_unet()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(unet, h=16, w=16, batch=2, **kwargs):
    return unet(normal(batch, 4, h, w), 500, encoder_hidden_states=normal(batch, 7, CONTEXT, seed=2), **kwargs).sample


def published_tomesd():
    """PyPI's package of the same name, imported under another one."""
    try:
        files = metadata.distribution("tomesd").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("PyPI's tomesd is not installed")
    init = next(file.locate() for file in files if str(file) == "tomesd/__init__.py")
    spec = importlib.util.spec_from_file_location(
        "published_tomesd", init, submodule_search_locations=[str(init.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["published_tomesd"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published():
    return published_tomesd()


OPTIONS = [
    {},
    {"max_downsample": 2},
    {"ratio": 0.75, "merge_crossattn": True},
    {"ratio": 0.3, "max_downsample": 2, "merge_mlp": True, "sx": 4},
    {"merge_attn": False, "merge_mlp": True},
]


def test_unet_equals_the_published_package(unet, published):
    for options, (h, w) in product(OPTIONS, [(16, 16), (12, 20), (10, 14)]):
        unpatched = run(unet, h, w)
        published.apply_patch(unet, use_rand=False, **options)
        expected = run(unet, h, w)
        published.remove_patch(unet)
        tomesd.apply_patch(unet, use_rand=False, **options)
        assert (run(unet, h, w) - expected).abs().max() <= 1e-6 * expected.abs().max(), (options, h, w)
        assert (unpatched - expected).abs().max() > 1e-4 * expected.abs().max(), (options, h, w)
        tomesd.remove_patch(unet)
        assert torch.equal(run(unet, h, w), unpatched), (options, h, w)


def test_keys_alone_and_in_proportion_equal_attention_written_out(unet):
    """Key by key in float64: softmax over all tokens, each with the key and the value of its merged token."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    plain, seen = run(unet), []
    block.attn1.register_forward_hook(lambda layer, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    hook = block.attn2.register_forward_pre_hook
    hook(lambda *_: seen.append(block.token_merging.runs[-1].matching))
    layer, heads = block.attn1, block.attn1.heads
    for merge_kv in (False, True):
        tomesd.apply_patch(unet, merge_kv=merge_kv, proportional=True)
        seen.clear()
        assert not torch.equal(run(unet), plain)
        (given, out), matching = seen
        keys = matching.unmerge(matching.merge(given) if merge_kv else given)
        q, k, v = (
            to(x).double().unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, to in ((given, layer.to_q), (keys, layer.to_k), (keys, layer.to_v))
        )
        expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        expected = layer.to_out[0](expected.transpose(1, 2).flatten(2).float())
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max(), merge_kv


def test_matching_equals_the_published_package(published):
    for w, h, r in [(8, 8, 32), (7, 5, 17), (9, 6, 99)]:
        metric, x = normal(2, h * w, 6), normal(2, h * w, 3, seed=4)
        theirs, ours = (
            package.merge.bipartite_soft_matching_random2d(
                metric, w, h, 2, 2, r, False, torch.Generator().manual_seed(9)
            )
            for package in (published, tomesd)
        )
        assert torch.equal(ours[1](ours[0](x)), theirs[1](theirs[0](x))), (w, h, r)


def test_remove_patch_restores_the_unet_bit_for_bit(unet):
    before, classes = run(unet), [type(module) for module in unet.modules()]
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    tomesd.apply_patch(unet, merge_crossattn=True, merge_mlp=True, max_downsample=2)
    assert not torch.equal(run(unet), before)
    tomesd.remove_patch(unet)
    assert torch.equal(run(unet), before)
    assert [type(module) for module in unet.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert state.keys() == unet.state_dict().keys()


def test_report_on_a_non_square_unet(unet):
    tomesd.apply_patch(unet)
    run(unet, 8, 24)
    counts = {(count.tokens_in, count.tokens_processed) for count in tomesd.token_report(unet)}
    assert counts == {(192, 96), (48, 48)}
    assert tomesd.token_report(unet)[0].name == "down_blocks.0.attentions.0.transformer_blocks.0"


def test_latents_may_be_passed_by_keyword(unet):
    tomesd.apply_patch(unet)
    expected = run(unet)
    tomesd.reseed(unet, 0)
    out = unet(sample=normal(2, 4, 16, 16), timestep=500, encoder_hidden_states=normal(2, 7, CONTEXT, seed=2))
    assert torch.equal(out.sample, expected)


def test_blocks_that_attend_to_the_prompt_only():
    unet = make_unet(only_cross_attention=(False, True))
    tomesd.apply_patch(unet, max_downsample=2, merge_crossattn=True)
    assert torch.isfinite(run(unet)).all()
    assert all(count.tokens_processed < count.tokens_in for count in tomesd.token_report(unet))


def test_block_with_adaptive_norm_and_no_second_attention():
    block = attention.BasicTransformerBlock(8, 2, 4, num_embeds_ada_norm=10, norm_type="ada_norm_zero").eval()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            labels = torch.zeros(2, dtype=torch.long)
            tokens = x.flatten(2).transpose(1, 2)
            return self.block(hidden_states=tokens, timestep=labels, class_labels=labels)

    net, x = Net(), normal(2, 8, 4, 4)
    before = net(x)
    tomesd.apply_patch(net, merge_crossattn=True, merge_mlp=True)
    assert not torch.equal(net(x), before)
    assert tomesd.token_report(net)[0].tokens_processed == 8
    assert torch.equal(tomesd.remove_patch(net)(x), before)


def test_a_chunked_feed_forward_cannot_be_merged(unet):
    for dim, chunk in {0: 1, 1: 4}.items():
        for module in unet.modules():
            if isinstance(module, attention.BasicTransformerBlock):
                module.set_chunk_feed_forward(chunk, dim=dim)
        whole = run(unet)
        tomesd.apply_patch(unet, merge_mlp=True)
        with pytest.raises(ValueError, match="switch forward chunking off"):
            run(unet)
        tomesd.apply_patch(unet)  # Around attention alone it can.
        assert not torch.equal(run(unet), whole), dim
        tomesd.remove_patch(unet)


def test_attention_processors_may_be_exchanged_while_patched(unet):
    tomesd.apply_patch(unet, seed=1, merge_crossattn=True)
    expected = run(unet)
    unet.set_attn_processor(processors.AttnProcessor())  # softmax(q k^T) v written out
    tomesd.reseed(unet, 1)
    out = run(unet)
    assert all(isinstance(processor, processors.AttnProcessor) for processor in unet.attn_processors.values())
    torch.testing.assert_close(out, expected)
    assert tomesd.token_report(unet)[0].tokens_processed == 128
    tomesd.remove_patch(unet)
    patched_after = run(tomesd.apply_patch(unet, seed=1, merge_crossattn=True))
    assert torch.equal(patched_after, out)


@torch.enable_grad()
def test_gradient_checkpointing_around_blocks(unet):
    tomesd.apply_patch(unet, max_downsample=2, merge_mlp=True)
    unet.train()
    gradients = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        unet.zero_grad()
        tomesd.reseed(unet, 0)
        run(unet).square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_copy_of_a_patched_unet_is_independent(unet):
    tomesd.apply_patch(unet, seed=1)
    expected = run(unet)
    twin = copy.deepcopy(unet)
    before = run(tomesd.remove_patch(unet))
    tomesd.reseed(twin, 1)
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(tomesd.remove_patch(twin)), before)


def test_a_mask_over_image_tokens_cannot_be_merged(unet):
    tomesd.apply_patch(unet)
    with pytest.raises(ValueError, match="attention mask over image tokens"):
        run(unet, attention_mask=torch.ones(2, 256))


def test_a_mask_over_prompt_tokens_is_no_hindrance(unet):
    tomesd.apply_patch(unet, use_rand=False, merge_crossattn=True)
    mask = torch.tensor([[1.0] * 4 + [0.0] * 3] * 2)
    out = run(unet, encoder_attention_mask=mask)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, run(unet))


@pytest.fixture
def pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=make_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    return pipe(
        prompt_embeds=normal(1, 7, CONTEXT, seed=3),
        negative_prompt_embeds=normal(1, 7, CONTEXT, seed=4),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **{"height": 32, "width": 24} | kwargs,
    ).images


def test_a_whole_pipeline(pipe):
    before = draw(pipe)
    assert tomesd.apply_patch(pipe, seed=1) is pipe
    merged = draw(pipe)
    assert merged.shape == before.shape == (1, 3, 32, 24)
    assert not torch.equal(merged, before)
    counts = {(count.tokens_in, count.tokens_processed) for count in tomesd.token_report(pipe)}
    assert counts == {(16 * 12, 16 * 12 // 2), (8 * 6, 8 * 6)}
    tomesd.reseed(pipe, 1)
    assert torch.equal(draw(pipe), merged)
    tomesd.remove_patch(pipe)
    assert torch.equal(draw(pipe), before)


def test_a_pipeline_without_unet_is_refused(pipe):
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline is no module and has no `unet`"):
        tomesd.apply_patch(pipe)
