"""apply_patch and remove_patch: on a small stand-in network, and on our UNet against the goldens."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import yaml
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import tomesd

GOLDENS = Path(__file__).parents[1] / "goldens"
RUNS = json.loads((GOLDENS / "tome.json").read_text())["unet"]


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.seen = 0

    def forward(self, x, context=None):
        self.seen = x.shape[1]
        source = x if context is None else context
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(source), self.v(source))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn1, self.attn2 = Attention(dim), Attention(dim)
        self.ff = nn.Linear(dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context=None):
        if self.training:
            return checkpoint(self._forward, x, context, use_reentrant=False)
        return self._forward(x, context)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class QuantBlock(BasicTransformerBlock):
    """As a quantized block: another class, the same work."""


class Net(nn.Module):
    """A block at full and one at half resolution."""

    def __init__(self, block=BasicTransformerBlock, dim=8):
        super().__init__()
        self.conv = nn.Conv2d(4, dim, 3, padding=1)
        self.down = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.fine, self.coarse = block(dim), block(dim)

    def forward(self, x, context=None):
        fine = self.fine(tokens_of(h := self.conv(x)), context)
        coarse = self.coarse(tokens_of(self.down(h)), context)
        return fine.mean(dim=1) + coarse.mean(dim=1), fine


class Quantized(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net

    def forward(self, x, context=None):
        return self.model(x, context)


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


def latents(batch=2, h=8, w=8, seed=1):
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def output(model, x=None, **kwargs):
    return model(latents() if x is None else x, **kwargs)[1]


def everything(model):
    """All that a patch could leave behind: classes, attributes and hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (name, type(module), sorted(vars(module)), [dict(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]


# What is merged, and where


def test_only_the_fine_block_merges_by_default(net, no_grad):
    tomesd.apply_patch(net)
    output(net)
    assert tomesd.token_report(net) == [
        tomesd.TokenCount(name="fine", tokens_in=64, tokens_processed=32),
        tomesd.TokenCount(name="coarse", tokens_in=16, tokens_processed=16),
    ]
    assert (net.fine.attn1.seen, net.fine.attn2.seen, net.coarse.attn1.seen) == (32, 64, 16)


def test_report_is_zero_before_the_first_forward(net):
    tomesd.apply_patch(net)
    assert tomesd.token_report(net)[0] == tomesd.TokenCount(name="fine", tokens_in=0, tokens_processed=0)


def test_max_downsample_admits_coarser_blocks(net, no_grad):
    tomesd.apply_patch(net, max_downsample=2)
    output(net)
    assert [count.tokens_processed for count in tomesd.token_report(net)] == [32, 8]


@pytest.mark.parametrize("layer", ["attn", "crossattn", "mlp"])
def test_each_layer_merges_when_asked(net, no_grad, layer):
    seen = {}
    for name in ("attn1", "attn2", "ff"):
        getattr(net.fine, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: args[0].shape[1]})
        )
    flags = {f"merge_{other}": other == layer for other in ("attn", "crossattn", "mlp")}
    tomesd.apply_patch(net, **flags)
    output(net, context=torch.ones(2, 5, 8))
    expected = {"attn1": "attn", "attn2": "crossattn", "ff": "mlp"}
    assert seen == {name: 32 if flag == layer else 64 for name, flag in expected.items()}


def test_block_equals_the_paper_written_out(net, no_grad):
    tomesd.apply_patch(net, use_rand=False, merge_crossattn=True, merge_mlp=True)
    x, block = tokens_of(net.conv(latents())), net.fine
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(x, 8, 8, 2, 2, 32, no_rand=True)
    patched = output(net)
    tomesd.remove_patch(net)
    h = unmerge(block.attn1(merge(block.norm1(x)))) + x
    h = unmerge(block.attn2(merge(block.norm2(h)))) + h
    h = unmerge(block.ff(merge(block.norm3(h)))) + h
    assert torch.equal(patched, h)


@pytest.mark.parametrize("h, w", [(9, 5), (7, 12), (1, 6), (3, 1), (17, 3)])
def test_any_size_works(net, no_grad, h, w):
    tomesd.apply_patch(net, max_downsample=8)
    out = output(net, latents(h=h, w=w))
    assert torch.isfinite(out).all()
    fine, coarse = tomesd.token_report(net)
    assert (fine.tokens_in, coarse.tokens_in) == (h * w, -(-h // 2) * -(-w // 2))
    assert fine.tokens_processed < fine.tokens_in


def test_a_network_that_does_not_tell_its_grid_is_refused(net, no_grad):
    tomesd.apply_patch(net, max_downsample=8)
    output(net)
    with pytest.raises(ValueError, match="20 tokens are no downsampled 8 x 8 grid"):
        net.fine(torch.ones(2, 20, 8))


def test_latents_may_be_passed_by_keyword(net, no_grad):
    tomesd.apply_patch(net)
    assert torch.equal(net(x=latents())[1], output(tomesd.apply_patch(net)))


def test_gradient_checkpointing_merges_the_same_tokens_again(net):
    tomesd.apply_patch(net, ratio=0.5, use_rand=True)
    grads = []
    for training in (True, False):
        net.train(training).zero_grad()
        tomesd.reseed(net, 3)
        output(net).square().sum().backward()
        grads.append(net.fine.attn1.q.weight.grad.clone())
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def test_a_block_by_itself_merges_as_in_the_forward_before(net, no_grad):
    tomesd.apply_patch(net)
    recorded = {}
    hook = net.fine.register_forward_hook(lambda module, args, out: recorded.update(x=args[0], out=out))
    output(net)
    hook.remove()
    assert torch.equal(net.fine(recorded["x"]), recorded["out"])


# Randomness


def test_same_seed_same_output_and_another_seed_another(net, no_grad):
    first, again, other = (output(tomesd.apply_patch(net, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forwards_differ_until_reseeded(net, no_grad):
    tomesd.apply_patch(net, seed=5)
    first, second = output(net), output(net)
    tomesd.reseed(net, 5)
    assert torch.equal(output(net), first)
    assert not torch.equal(first, second)


def test_the_global_generator_is_neither_read_nor_advanced(net, no_grad):
    tomesd.apply_patch(net, seed=5)
    with torch.random.fork_rng():
        outputs = []
        for global_seed in (1, 2):
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            tomesd.reseed(net, 5)
            outputs.append(output(net))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("batch, random", [(1, False), (2, True), (3, False), (4, True)])
def test_odd_batches_are_never_random(net, no_grad, batch, random):
    x = latents(batch)
    chosen = output(tomesd.apply_patch(net, use_rand=True), x)
    fixed = output(tomesd.apply_patch(net, use_rand=False), x)
    assert torch.equal(chosen, fixed) is not random


def test_equal_samples_of_a_guided_batch_merge_alike(net, no_grad):
    tomesd.apply_patch(net)
    out = output(net, latents(1).repeat(2, 1, 1, 1))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)


# The way in and the way out


@pytest.mark.parametrize("block", [BasicTransformerBlock, QuantBlock])
def test_remove_patch_restores_everything(no_grad, block):
    net = Net(block).eval()
    output_before, modules_before = output(net), everything(net)
    state_before = {key: value.clone() for key, value in net.state_dict().items()}
    tomesd.apply_patch(net, merge_crossattn=True, merge_mlp=True)
    assert not torch.equal(output(net), output_before)
    assert net.state_dict().keys() == state_before.keys()
    assert isinstance(net.fine, block)
    assert tomesd.remove_patch(net) is net
    assert everything(net) == modules_before
    assert torch.equal(output(net), output_before)
    assert net.state_dict().keys() == state_before.keys()
    assert all(torch.equal(value, state_before[key]) for key, value in net.state_dict().items())


def test_remove_patch_leaves_an_unpatched_model_and_foreign_hooks_alone(net):
    net.fine.attn1.register_forward_hook(lambda module, args, out: None)
    before = everything(net)
    tomesd.remove_patch(net)
    assert everything(net) == before
    tomesd.remove_patch(tomesd.apply_patch(net))
    assert everything(net) == before


def test_a_second_patch_replaces_the_first(net, no_grad):
    fresh = output(tomesd.apply_patch(copy.deepcopy(net), ratio=0.25, use_rand=False))
    before = everything(net)
    tomesd.apply_patch(net, ratio=0.75, max_downsample=2, merge_mlp=True)
    tomesd.apply_patch(net, ratio=0.25, use_rand=False)
    assert torch.equal(output(net), fresh)
    assert len(net._forward_pre_hooks) == len(net.fine.attn1._forward_pre_hooks) == 1
    assert everything(tomesd.remove_patch(net)) == before


def test_ratio_zero_changes_nothing(net, no_grad):
    before = output(net)
    assert torch.equal(output(tomesd.apply_patch(net, ratio=0)), before)


def test_an_exception_in_a_forward_leaves_the_model_usable(net, no_grad):
    unpatched = output(net)
    patched = output(tomesd.apply_patch(net, use_rand=False))
    with pytest.raises(RuntimeError):
        net(latents(), context=torch.ones(2, 5, 99))
    assert net.fine._tome.matching is None
    assert torch.equal(output(net), patched)
    assert torch.equal(output(tomesd.remove_patch(net)), unpatched)


def test_a_copy_of_a_patched_model_is_independent(net, no_grad):
    tomesd.apply_patch(net, seed=4)
    twin = copy.deepcopy(net)
    expected = output(net)
    assert torch.equal(output(twin), expected)
    tomesd.remove_patch(net)
    assert tomesd.token_report(twin)[0].tokens_processed == 32
    with pytest.raises(ValueError, match="has no merged tokens"):
        tomesd.token_report(net)


class LatentDiffusion(nn.Module):
    """The network at model.diffusion_model, beside other parts."""

    def __init__(self, net):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = net
        self.first_stage_model = nn.Linear(1, 1)


WRAPPERS = {
    "quantized": Quantized,
    "latent diffusion": LatentDiffusion,
    "pipeline": lambda net: SimpleNamespace(unet=net, vae=nn.Linear(1, 1)),
    "quantized in a pipeline": lambda net: SimpleNamespace(unet=Quantized(net)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_network_is_found_wherever_it_is(net, no_grad, kind):
    expected = output(tomesd.apply_patch(copy.deepcopy(net)))
    before = everything(net)
    model = WRAPPERS[kind](net)
    assert tomesd.apply_patch(model) is model
    assert torch.equal(output(net), expected)
    assert [count.name for count in tomesd.token_report(model)] == ["fine", "coarse"]
    tomesd.remove_patch(model)
    assert everything(net) == before


# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": -0.1}, r"ratio is -0.1.*\[0, 0.75\]"),
        ({"ratio": 0.76}, r"ratio is 0.76.*\[0, 0.75\]"),
        ({"ratio": 0.76, "sx": 1}, r"\[0, 0.5\]"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": float("inf")}, "ratio is inf"),
        ({"ratio": "0.5"}, "ratio is '0.5'"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": 0.1, "sx": 1, "sy": 1}, r"\[0, 0\]"),
        ({"sx": 0}, "sx is 0"),
        ({"sy": -2}, "sy is -2"),
        ({"sy": 2.0}, "sy is 2.0"),
        ({"max_downsample": 3}, "max_downsample is 3"),
        ({"max_downsample": True}, "max_downsample is True"),
        ({"use_rand": "yes"}, "use_rand is 'yes'"),
        ({"merge_attn": False}, "nothing to merge"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_bad_options_are_refused_and_the_model_is_not_touched(net, options, message):
    before = everything(net)
    with pytest.raises(ValueError, match=message):
        tomesd.apply_patch(net, **options)
    assert everything(net) == before


def test_the_largest_ratio_is_allowed(net, no_grad):
    tomesd.apply_patch(net, ratio=0.75)
    output(net)
    assert tomesd.token_report(net)[0].tokens_processed == 16


def test_models_without_blocks_are_refused():
    with pytest.raises(ValueError, match="no BasicTransformerBlock found in Linear"):
        tomesd.apply_patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module and has no `unet`"):
        tomesd.apply_patch("unet")


def test_blocks_of_another_architecture_are_refused(net):
    del net.coarse.ff
    before = everything(net)
    with pytest.raises(ValueError, match="block coarse has no ff"):
        tomesd.apply_patch(net)
    assert everything(net) == before


def test_use_before_apply_patch_is_refused(net):
    with pytest.raises(ValueError, match=r"call tomesd\.apply_patch first"):
        tomesd.token_report(net)
    with pytest.raises(ValueError, match=r"call tomesd\.apply_patch first"):
        tomesd.reseed(net, 0)


def test_a_block_that_runs_before_the_network_is_refused(net):
    tomesd.apply_patch(net)
    with pytest.raises(ValueError, match="run the whole model once first"):
        net.fine(torch.ones(2, 64, 8))


def test_first_arguments_that_are_no_latents_are_refused(net):
    tomesd.apply_patch(net)
    with pytest.raises(ValueError, match=r"needs latents \[B, C, H, W\] as the first argument of Net"):
        net(torch.ones(2, 4, 8))


# Our UNet


@pytest.fixture(scope="module")
def unet():
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = yaml.safe_load((GOLDENS / "tiny_ldm.yaml").read_text())["model"]["params"]["unet_config"]["params"]
    unet = UNetModel(**config)
    prefix = "model.diffusion_model."
    weights = load_file(GOLDENS / "tiny_ldm.safetensors")
    unet.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    return unet.eval()


@pytest.fixture(scope="module")
def goldens():
    return load_file(GOLDENS / "tome.safetensors")


def inputs_of(name, goldens):
    x, t, context = (goldens[f"unet/in_{RUNS[name]['input']}/{part}"] for part in ("x", "t", "context"))
    return {"x": x, "timesteps": t, "context": context}


def assert_close(out, expected):
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", RUNS)
def test_unet_equals_the_goldens(unet, goldens, no_grad, name):
    run, inputs = RUNS[name], inputs_of(name, goldens)
    # One run asked for 0.9 and got 0.75, all there is to merge in 2 x 2 tiles; here 0.75 is the most one may ask.
    kwargs = run["kwargs"] | {"ratio": min(run["kwargs"]["ratio"], 0.75)}
    unpatched = unet(**inputs)
    try:
        tomesd.apply_patch(unet, **kwargs, seed=run["seed"])
        assert_close(unet(**inputs), goldens[f"unet/{name}/out"])
        counts = tomesd.token_report(unet)
        if f"unet/{name}/out_second_call" in goldens:
            assert_close(unet(**inputs), goldens[f"unet/{name}/out_second_call"])
    finally:
        tomesd.remove_patch(unet)
    assert len(counts) == run["patched_blocks"]
    assert sum(count.tokens_processed < count.tokens_in for count in counts) == run["blocks_that_merge"]
    assert torch.equal(unet(**inputs), unpatched)


def test_a_subclass_of_our_block_is_merged_as_the_block_itself(unet, goldens, no_grad):
    from ldm.modules import attention

    quantized = type("QuantBasicTransformerBlock", (attention.BasicTransformerBlock,), {})
    inputs = inputs_of(next(iter(RUNS)), goldens)
    unpatched = unet(**inputs)
    tomesd.apply_patch(unet, max_downsample=2)
    plain, counts = unet(**inputs), tomesd.token_report(unet)
    tomesd.remove_patch(unet)
    blocks = [module for module in unet.modules() if type(module) is attention.BasicTransformerBlock]
    try:
        for block in blocks:
            block.__class__ = quantized
        before = everything(unet)
        tomesd.apply_patch(unet, max_downsample=2)
        assert torch.equal(unet(**inputs), plain) and not torch.equal(plain, unpatched)
        assert tomesd.token_report(unet) == counts and len(counts) == len(blocks) > 0
        assert all(isinstance(block, quantized) and type(block) is not quantized for block in blocks)
        tomesd.remove_patch(unet)
        assert all(type(block) is quantized for block in blocks) and everything(unet) == before
        assert torch.equal(unet(**inputs), unpatched)
    finally:
        tomesd.remove_patch(unet)
        for block in blocks:
            block.__class__ = attention.BasicTransformerBlock


# Pinned draws


def test_pinned_draws_are_the_same_in_all_forwards_and_batches(net, no_grad):
    x = latents(4)
    tomesd.apply_patch(net, seed=3)
    with tomesd.pinned(net, 5):
        whole = output(net, x)
        assert torch.equal(output(net, x), whole)
        for part in (x[:1], x[:3]):  # odd batches, otherwise never random
            torch.testing.assert_close(output(net, part), whole[: len(part)], rtol=0, atol=1e-6)
    with tomesd.pinned(net, 6):
        assert not torch.equal(output(net, x), whole)


def test_after_pinned_draws_forwards_differ_again_and_odd_batches_are_not_random(net, no_grad):
    tomesd.apply_patch(net, seed=3)
    with pytest.raises(RuntimeError, match="on the way"), tomesd.pinned(net, 5):
        output(net)
        raise RuntimeError("on the way")
    assert not torch.equal(output(net), output(net))
    odd = output(net, latents(1))
    assert torch.equal(odd, output(tomesd.apply_patch(net, use_rand=False), latents(1)))


def test_only_a_patched_model_can_be_pinned(net):
    with pytest.raises(ValueError, match="no merged tokens"), tomesd.pinned(net, 5):
        pass
