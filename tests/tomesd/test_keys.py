"""Keys that stand for several tokens, and keys and values merged alone, against attention written out in float64."""

import pytest
import torch
import torch.nn as nn

import tomesd
from ldm.modules.attention import BasicTransformerBlock, CrossAttention


def attention(layer, queries, keys, heads, log_sizes=None):
    """Return attention of queries [B, N, C] over keys [B, M, C] in float64, key by key."""
    q, k, v = (
        (x.double() @ to.weight.double().T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, to in ((queries, layer.to_q), (keys, layer.to_k), (keys, layer.to_v))
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if log_sizes is None else scores + log_sizes[:, None, None].double()
    out = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v
    last = layer.to_out[0]
    return out.transpose(1, 2).flatten(2) @ last.weight.double().T + last.bias.double()


class Ours(BasicTransformerBlock):
    def __init__(self, dim):
        super().__init__(dim, 2, dim // 2)


@pytest.fixture
def ours(make_net):
    """The small network with transformer blocks of our UNet, and the inputs and outputs of its first self-attention."""
    net, seen = make_net(Ours), []
    for name in ("conv", "down"):
        getattr(net, name).weight.data.mul_(3)
    net.fine.attn1.register_forward_hook(lambda layer, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    return net, seen


CASES = ({}, {"sx": 4, "sy": 4, "ratio": 0.9}, {"ratio": 0.75}, {"use_rand": False})


def test_a_key_counts_as_often_as_tokens_were_merged_into_it(ours, no_grad, output):
    """softmax over the merged keys, each with its size, is softmax over all tokens, each with its merged key."""
    net, seen = ours
    for merge_kv in (False, True):
        for case in CASES:
            matchings = matched(net, **case, merge_kv=merge_kv, proportional=True)
            seen.clear()
            output(net)
            matching, (given, out) = matchings[-1], seen[-1]
            tokens = given if merge_kv else matching.unmerge(given)  # hooks see what the layer works on
            copies = matching.unmerge(matching.merge(given)) if merge_kv else tokens
            expected = attention(net.fine.attn1, given, copies, 2)
            assert (out - expected).abs().max() < 1e-5 * expected.abs().max(), (merge_kv, case)
            without = attention(net.fine.attn1, given, matching.merge(given) if merge_kv else given, 2)
            assert (out - without).abs().max() > 1e-3 * expected.abs().max(), (merge_kv, case)


def test_keys_and_values_alone_are_merged_and_nothing_is_unmerged(ours, no_grad, output):
    net, seen = ours
    for case in CASES:
        matchings = matched(net, **case, merge_kv=True)
        seen.clear()
        output(net)
        (given, out), matching = seen[-1], matchings[-1]
        expected = attention(net.fine.attn1, given, matching.merge(given), 2)
        assert given.shape[1] == 64 and tomesd.token_report(net)[0].tokens_processed == matching.tokens_after, case
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max(), case


def matched(net, **options):
    """Patch the network; return the list to which its first block adds each matching that it uses."""
    matchings = []
    tomesd.apply_patch(net, **options)
    hook = net.fine.attn2.register_forward_hook
    hook(lambda *_: matchings.append(net.fine.token_merging.runs[-1].matching))
    return matchings


def test_sizes_count_the_tokens_of_each_key():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]]])  # 2 x 2: the first is the destination
    for r, sizes in ((1, [1, 1, 2]), (2, [1, 3]), (3, [4])):
        matching = tomesd.merge.match_tokens(x, 2, 2, 2, 2, r)
        torch.testing.assert_close(matching.log_sizes.exp(), torch.tensor([sizes], dtype=torch.float32))
    metric = torch.randn(3, 64, 5)
    matching = tomesd.merge.match_tokens(metric, 8, 8, 2, 2, 40)
    ones = matching.merge(torch.ones(3, 64, 1), mode="sum").squeeze(-1)
    torch.testing.assert_close(matching.log_sizes.exp(), ones)


def test_merging_equal_tokens_loses_nothing(no_grad, make_net, latents):
    """Where tokens of a tile are equal, keys in proportion give what all tokens give; without, they do not."""
    net = make_net(Ours)
    tokens = torch.randn(2, 4, 4, 8).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2) * 2
    plain = net.fine(tokens)
    for merge_kv in (False, True):
        for proportional in (False, True):
            # Half of the tokens: some keys stand for more than others.
            tomesd.apply_patch(net, ratio=0.4, merge_kv=merge_kv, proportional=proportional)
            net(latents())
            error = (net.fine(tokens) - plain).abs().max()
            assert bool(error < 1e-5) is proportional, (merge_kv, proportional, float(error))


def test_a_sample_does_not_depend_on_its_batch(ours, no_grad, latents):
    net, _ = ours
    x = latents(4)
    for merge_kv in (False, True):
        tomesd.apply_patch(net, use_rand=False, merge_kv=merge_kv, proportional=True)
        whole = net(x)[1]
        for i in range(4):
            torch.testing.assert_close(net(x[i : i + 1])[1], whole[i : i + 1], rtol=0, atol=1e-5)


def test_everything_is_restored(net, no_grad, output, everything):
    before, modules = output(net), everything(net)
    tomesd.apply_patch(net, merge_kv=True, proportional=True)
    assert not torch.equal(output(net), before)
    tomesd.remove_patch(net)
    assert torch.equal(output(net), before) and everything(net) == modules


def test_gradients_reach_keys_through_the_merge(make_net, latents):
    net = make_net(Ours)
    tomesd.apply_patch(net, merge_kv=True, proportional=True, use_rand=False)
    gradients = []
    for training in (False, True):  # with gradient checkpointing, too
        net.train(training).zero_grad()
        net(latents())[1].square().sum().backward()
        gradients.append(net.fine.attn1.to_k.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_under_autocast_it_is_the_same_up_to_rounding(ours, no_grad, output):
    net, _ = ours
    for options in ({"proportional": True}, {"proportional": True, "merge_kv": True}):
        tomesd.apply_patch(net, use_rand=False, **options)
        expected = output(net)
        with torch.autocast("cpu", torch.bfloat16):
            assert (output(net) - expected).abs().max() < 0.1 * expected.abs().max(), options


def test_layers_without_the_arguments_are_refused_before_anything_is_patched(net, everything):
    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    net.coarse.attn1 = Plain(8, 8)
    before = everything(net)
    for option, names in (("merge_kv", "context or encoder_hidden_states"), ("proportional", "mask or attention_mask")):
        with pytest.raises(ValueError, match=f"attn1 of block coarse takes no {names}: leave out {option}"):
            tomesd.apply_patch(net, **{option: True})
        assert everything(net) == before


def test_a_mask_beside_sizes_is_refused(no_grad):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1, self.attn2, self.ff = CrossAttention(4, heads=1, dim_head=4), nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.attn1(x, mask=torch.ones(len(x), 5, dtype=torch.bool))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = type("BasicTransformerBlock", (Block,), {})()

        def forward(self, x):
            return self.block(x.flatten(2).mT)

    net = tomesd.apply_patch(Net(), proportional=True)
    with pytest.raises(ValueError, match="takes the place of mask: leave it away"):
        net(torch.randn(1, 4, 4, 4))
