"""What the hooks of a patched network merge, when, and what they leave behind."""

import gc
import weakref

import pytest
import torch
import torch.nn as nn

import tomesd


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


# What is merged, and where


def test_only_the_fine_block_merges_by_default(net, no_grad, output):
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


def test_tokens_are_compared_by_the_given_function(net, no_grad, output):
    """It may leave the comparison to PyTorch by returning None."""
    calls = []

    def first(x, sources, targets):
        calls.append((x.shape, len(sources), len(targets)))
        return torch.zeros(x.shape[0], len(sources)), torch.zeros(x.shape[0], len(sources), dtype=torch.long)

    tomesd.apply_patch(net)
    plain = output(net)
    tomesd.apply_patch(net, nearest=lambda *_: None)
    assert torch.equal(output(net), plain)
    tomesd.apply_patch(net, nearest=first)
    assert not torch.equal(output(net), plain)
    assert [call[1:] for call in calls] == [(48, 16)]


def test_max_downsample_admits_coarser_blocks(net, no_grad, output):
    tomesd.apply_patch(net, max_downsample=2)
    output(net)
    assert [count.tokens_processed for count in tomesd.token_report(net)] == [32, 8]


def test_the_largest_ratio_keeps_the_destinations(net, no_grad, output):
    tomesd.apply_patch(net, ratio=0.75)
    output(net)
    assert tomesd.token_report(net)[0].tokens_processed == 16


def test_each_layer_merges_when_asked(net, no_grad, output):
    seen = {}
    for name in ("attn1", "attn2", "ff"):
        getattr(net.fine, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: args[0].shape[1]})
        )
    layers = {"attn1": "merge_attn", "attn2": "merge_crossattn", "ff": "merge_mlp"}
    for asked, flag in layers.items():
        tomesd.apply_patch(net, **{other: other == flag for other in layers.values()})
        output(net, context=torch.ones(2, 5, 8))
        assert seen == {name: 32 if name == asked else 64 for name in layers}, asked


def test_block_equals_the_paper_written_out(net, no_grad, output, latents):
    tomesd.apply_patch(net, use_rand=False, merge_crossattn=True, merge_mlp=True)
    x, block = tokens_of(net.conv(latents())), net.fine
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(x, 8, 8, 2, 2, 32, no_rand=True)
    patched = output(net)
    tomesd.remove_patch(net)
    h = unmerge(block.attn1(merge(block.norm1(x)))) + x
    h = unmerge(block.attn2(merge(block.norm2(h)))) + h
    h = unmerge(block.ff(merge(block.norm3(h)))) + h
    assert torch.equal(patched, h)


def test_any_size_works(net, no_grad, output, latents):
    tomesd.apply_patch(net, max_downsample=8)
    for h, w in [(9, 5), (7, 12), (1, 6), (3, 1), (17, 3)]:
        assert torch.isfinite(output(net, latents(h=h, w=w))).all(), (h, w)
        fine, coarse = tomesd.token_report(net)
        assert (fine.tokens_in, coarse.tokens_in) == (h * w, -(-h // 2) * -(-w // 2)), (h, w)
        assert fine.tokens_processed < fine.tokens_in, (h, w)


def test_inputs_may_be_passed_by_keyword(net, no_grad, output, latents):
    expected = output(tomesd.apply_patch(net))
    tomesd.apply_patch(net)
    assert torch.equal(net(x=latents())[1], expected)
    assert torch.equal(net.fine(x=tokens_of(net.conv(latents()))), expected)


class AddsResidual(nn.Linear):
    """A feed-forward layer that can add its output to a residual in place."""

    calls = ()

    def forward(self, x, residual=None):
        self.calls = (*self.calls, (x.shape[1], residual is not None))
        return super().forward(x) if residual is None else residual.add_(super().forward(x))


def test_a_residual_is_added_after_unmerging(block_class, make_net, no_grad, output):
    class Block(block_class):
        def __init__(self, dim):
            super().__init__(dim)
            self.ff = AddsResidual(dim, dim)

        def _forward(self, x, context=None):
            x = self.attn1(self.norm1(x)) + x
            x = self.attn2(self.norm2(x), context=context) + x
            return self.ff(self.norm3(x), residual=x)

    options = {"merge_crossattn": True, "merge_mlp": True, "use_rand": False}
    net, plain = make_net(Block), make_net()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(output(net), output(plain))
    assert net.fine.ff.calls == ((64, True),)
    tomesd.apply_patch(net, **options)
    assert torch.equal(output(net), output(tomesd.apply_patch(plain, **options)))
    assert net.fine.ff.calls[1:] == ((32, False),)
    assert net.coarse.ff.calls == ((16, True), (16, True))  # not merged: the layer adds, as without a patch


# Refusals


def test_a_network_that_does_not_tell_its_grid_is_refused(net, no_grad, output):
    tomesd.apply_patch(net, max_downsample=8)
    output(net)
    with pytest.raises(ValueError, match="20 tokens are no downsampled 8 x 8 grid"):
        net.fine(torch.ones(2, 20, 8))


def test_a_block_that_runs_before_the_network_is_refused(net):
    tomesd.apply_patch(net)
    with pytest.raises(ValueError, match="run the whole model once first"):
        net.fine(torch.ones(2, 64, 8))
    assert not net.fine.token_merging.runs


def test_first_arguments_that_are_no_tensors_of_the_right_kind_are_refused(net, output):
    tomesd.apply_patch(net)
    with pytest.raises(ValueError, match=r"needs latents \[B, C, H, W\] as the first argument of Net"):
        net(torch.ones(2, 4, 8))
    output(net)
    with pytest.raises(ValueError, match=r"needs tokens \[B, N, C\] as the first argument of BasicTransformerBlock"):
        net.fine(tokens=torch.ones(2, 64, 8))


# The end of a matching


def test_no_matching_outlives_a_forward_that_fails(net, no_grad, output, latents):
    patched = output(tomesd.apply_patch(net, use_rand=False))
    merging = net.fine.token_merging

    def fail(error):
        def hook(*args):
            raise error("on the way")

        return hook

    cases = {
        "a layer": (net.fine.attn2.register_forward_pre_hook, RuntimeError),
        "a pre-hook of the block": (net.fine.register_forward_pre_hook, RuntimeError),
        "a hook of the block": (net.fine.register_forward_hook, RuntimeError),
        "a merged layer's hook": (net.fine.attn1.register_forward_hook, RuntimeError),
    }
    for case, (register, error) in cases.items():
        handle = register(fail(error))
        with pytest.raises(error, match="on the way"):
            output(net)
        handle.remove()
        assert not merging.runs and merging.recomputed is None, case
        net.fine.attn1(torch.ones(2, 64, 8))
        assert net.fine.attn1.seen == 64, case
        assert torch.equal(output(net), patched), case


def test_an_interrupted_forward_is_forgotten_by_the_next(net, no_grad, output):
    patched = output(tomesd.apply_patch(net, use_rand=False))

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = net.fine.attn2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        output(net)
    handle.remove()
    assert torch.equal(output(net), patched)
    assert not net.fine.token_merging.runs


def test_a_block_may_run_within_itself(net, no_grad, output):
    tomesd.apply_patch(net, use_rand=False, merge_crossattn=True, merge_mlp=True)
    expected, inner, depth = output(net), [], []

    def run_again(module, args, out):
        if not depth:
            depth.append(1)
            inner.append(net.fine(torch.ones(2, 16, 8)))  # the coarse grid: nothing is merged
            inner.append(net.fine(torch.ones(4, 64, 8)))

    net.fine.attn1.register_forward_hook(run_again)
    assert torch.equal(output(net), expected)
    assert [len(out) for out in inner] == [2, 4]
    assert not net.fine.token_merging.runs


def test_matching_sees_the_input_that_hooks_before_it_have_changed(net, no_grad, output, latents):
    x = tokens_of(net.conv(latents()))
    changed = x.flip(1) * x
    expected = tomesd.merge.match_tokens(changed, 8, 8, 2, 2, 32)
    seen = []
    net.fine.register_forward_pre_hook(lambda module, args: (changed, *args[1:]))
    net.fine.attn2.register_forward_hook(lambda *args: seen.append(net.fine.token_merging.runs[-1].matching))
    tomesd.apply_patch(net, use_rand=False)
    output(net)
    assert torch.equal(seen[0].src_idx, expected.src_idx)


# Gradients


def gradients(net, latents, steps):
    """Two forwards, then one backward pass through both."""
    net.zero_grad()
    tomesd.reseed(net, 3)
    loss = sum(net(latents(seed=seed))[1].square().sum() for seed in range(steps))
    loss.backward()
    return [parameter.grad.clone() for parameter in net.fine.parameters()]


def test_gradient_checkpointing_merges_the_same_tokens_again(make_net, block_class, latents):
    """Within the block's forward, of both kinds, and around the block; also through several forwards at once."""
    options = {"ratio": 0.5, "use_rand": True, "merge_crossattn": True, "merge_mlp": True}
    for reentrant in (False, True):
        net = make_net(type("Block", (block_class,), {"reentrant": reentrant}))
        tomesd.apply_patch(net, **options)
        for steps in (1, 3):
            net.eval()
            stored = gradients(net, latents, steps)
            net.train()
            recomputed = gradients(net, latents, steps)
            assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True)), (reentrant, steps)
            assert all(gradient.abs().sum() > 0 for gradient in stored[:2])
            assert net.fine.attn1.seen == 32


def test_after_a_backward_pass_layers_alone_do_not_merge(net, output):
    tomesd.apply_patch(net)
    net.train()
    output(net).sum().backward()
    assert net.fine.token_merging.recomputed is None
    net.fine.attn1(torch.ones(2, 64, 8))
    assert net.fine.attn1.seen == 64


def test_after_a_backward_pass_that_ends_at_the_block_layers_alone_do_not_merge_without_gradients(net, output):
    tomesd.apply_patch(net)
    net.train()
    net.conv.requires_grad_(False)
    output(net).sum().backward()
    with torch.no_grad():
        net.fine.attn1(torch.ones(2, 64, 8))
        assert net.fine.attn1.seen == 64
        output(net)
    assert net.fine.token_merging.recomputed is None


def test_a_leaf_keeps_no_hooks(net, output):
    tomesd.apply_patch(net)
    output(net)
    x = torch.ones(2, 64, 8, requires_grad=True)
    for _ in range(2):
        net.fine(x).sum().backward()
    assert not x._backward_hooks


def test_a_matching_is_freed_with_its_graph(net, output):
    tomesd.apply_patch(net)
    seen = []
    net.fine.attn2.register_forward_hook(
        lambda *args: seen.append(weakref.ref(net.fine.token_merging.runs[-1].matching))
    )
    out = output(net)
    gc.collect()
    assert seen[0]() is not None and out.requires_grad
    del out
    gc.collect()
    assert seen[0]() is None
