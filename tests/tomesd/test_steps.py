"""What is merged at which step and level, and matchings that are used again."""

import pytest
import torch

import tomesd


def tokens(net):
    return [count.tokens_processed for count in tomesd.token_report(net)]


def changing(latents, calls, same=False):
    """Return the latents of so many steps."""
    return [latents(seed=1 if same else seed) for seed in range(calls)]


def walked(net, xs, calls=None):
    """Return the output of the network in each step, and the tokens that its blocks processed."""
    outputs, counts = [], []
    with tomesd.walk(net, calls or len(xs)):
        for x in xs:
            outputs.append(net(x)[0])
            counts.append(tokens(net))
    return outputs, counts


def test_a_schedule_gives_each_step_its_ratio(net, no_grad, latents):
    tomesd.apply_patch(net, merge_schedule="0:0.75,0.5:0.25")
    for steps in (1, 2, 3, 10):
        _, counts = walked(net, changing(latents, steps))
        assert counts == [[16 if 2 * step < steps else 48, 16] for step in range(steps)], steps
    _, counts = walked(net, changing(latents, 4), calls=2)
    assert counts == [[16, 16], [48, 16], [48, 16], [48, 16]]  # beyond the walk: the last step's


def test_each_step_merges_as_its_ratio_alone_does(net, no_grad, latents):
    xs = changing(latents, 3)
    outputs, _ = walked(tomesd.apply_patch(net, merge_schedule="linear:0.75:0.25", use_rand=False), xs)
    for ratio, x, output in zip((0.75, 0.5, 0.25), xs, outputs, strict=True):
        assert torch.equal(tomesd.apply_patch(net, ratio=ratio, use_rand=False)(x)[0], output), ratio


def test_a_ratio_of_zero_within_a_schedule_merges_nothing(net, no_grad, latents):
    plain = net(latents())[0]
    outputs, counts = walked(
        tomesd.apply_patch(net, ratio=0, merge_schedule="0.5:0.5"), changing(latents, 2, same=True)
    )
    assert torch.equal(outputs[0], plain) and not torch.equal(outputs[1], plain)
    assert counts == [[64, 16], [32, 16]]


def test_levels_have_ratios_of_their_own(net, no_grad, latents):
    for levels, expected in (("1:0.75,2:0.25", [16, 12]), ("2:0.5", [64, 8]), ("1:0.25", [48, 16])):
        tomesd.apply_patch(net, ratio=0.75, merge_levels=levels)
        net(latents())
        assert tokens(net) == expected, levels


def test_what_follows_the_steps_needs_a_walk(net, no_grad, latents):
    for options in ({"merge_schedule": "0:0.5"}, {"merge_every": 2}):
        tomesd.apply_patch(net, **options)
        with pytest.raises(ValueError, match=r"call the model within tomesd\.walk"):
            net(latents())
        walked(net, [latents()])
        with pytest.raises(ValueError, match=r"call the model within tomesd\.walk"):
            net(latents())
    for calls in (0, 1.0, True):
        with pytest.raises(ValueError, match="calls is"), tomesd.walk(net, calls):
            pass
    with pytest.raises(ValueError, match="no merged tokens"), tomesd.walk(tomesd.remove_patch(net), 3):
        pass


def test_a_walk_changes_nothing_where_nothing_follows_the_steps(net, no_grad, latents):
    xs = changing(latents, 3)
    tomesd.apply_patch(net, seed=4)
    expected = [net(x)[0] for x in xs]
    tomesd.reseed(net, 4)
    assert all(torch.equal(a, b) for a, b in zip(walked(net, xs)[0], expected, strict=True))


def test_a_walk_within_a_walk_leaves_the_outer_one_as_it_was(net, no_grad, latents):
    tomesd.apply_patch(net, merge_schedule="0:0.75,0.5:0.25")
    with tomesd.walk(net, 2):
        net(latents())
        with pytest.raises(RuntimeError), tomesd.walk(net, 5):
            net(latents())
            raise RuntimeError
        net(latents())
        assert tokens(net)[0] == 48


# Matchings that are used again


def test_a_kept_matching_equals_a_new_one_where_the_tokens_do_not_change(net, no_grad, latents):
    xs = changing(latents, 5, same=True)
    fresh, _ = walked(tomesd.apply_patch(net, use_rand=False, max_downsample=2), xs)
    for every in (2, 3, 9):
        kept, _ = walked(tomesd.apply_patch(net, use_rand=False, max_downsample=2, merge_every=every), xs)
        assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True)), every


def test_tokens_are_matched_in_every_nth_step_only(net, no_grad, latents):
    calls = []
    tomesd.apply_patch(net, merge_every=3, max_downsample=2, nearest=lambda x, *_: calls.append(len(x)))
    walked(net, changing(latents, 7))
    assert len(calls) == 2 * 3  # two blocks, in steps 0, 3 and 6
    walked(net, changing(latents, 2))
    assert len(calls) == 2 * 4  # nothing is kept from one walk to the next
    with tomesd.walk(net, 9):
        for batch in (2, 4, 2):
            net(latents(batch))
    assert len(calls) == 2 * 6  # another batch has matchings of its own
    with tomesd.walk(net, 9):
        net(latents())
        tomesd.reseed(net, 0)
        net(latents())
    assert len(calls) == 2 * 8


def test_between_matchings_tokens_are_merged_as_before(net, no_grad, latents):
    """Step 1 merges the tokens that step 0 found, whatever its own are."""
    first, second = changing(latents, 2)
    tomesd.apply_patch(net, merge_every=2, use_rand=False)
    (_, kept), _ = walked(net, [first, second])
    seen = []
    net.fine.attn2.register_forward_hook(lambda *_: seen.append(net.fine.token_merging.runs[-1].matching))
    walked(net, [first, second, second])
    assert seen[0] is seen[1] is not seen[2]
    assert not torch.equal(kept, walked(net, [second])[0][0])


def test_the_ratio_of_a_kept_matching_is_that_of_its_step(net, no_grad, latents):
    tomesd.apply_patch(net, merge_every=2, merge_schedule="linear:0.75:0")
    _, counts = walked(net, changing(latents, 4))
    assert [fine for fine, _ in counts] == [16, 16, 48, 48]


def test_blocks_of_a_level_share_the_matching_of_the_first(block_class, make_net, no_grad, latents):
    class Net(type(make_net())):
        def __init__(self, block=block_class, dim=8):
            super().__init__(block, dim)
            self.again = block(dim)

        def forward(self, x, context=None):
            h = self.fine(self.conv(x).flatten(2).transpose(1, 2))
            return self.again(h * h), self.coarse(self.down(self.conv(x)).flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    net, calls, seen = Net().eval(), [], []
    for block in (net.fine, net.again, net.coarse):
        block.attn2.register_forward_hook(lambda *_, b=block: seen.append(b.token_merging.runs[-1].matching))
    tomesd.apply_patch(net, merge_share=True, max_downsample=2, nearest=lambda x, *_: calls.append(x.shape[1]))
    net(latents())
    assert calls == [64, 16] and seen[0] is seen[1] and seen[2].tokens_before == 16
    net(latents(seed=2))
    assert calls == [64, 16] * 2 and seen[3] is not seen[0]
    tomesd.apply_patch(net, merge_share=True, merge_every=2, nearest=lambda x, *_: calls.append(x.shape[1]))
    walked(net, changing(latents, 3))
    assert calls[4:] == [64, 64]


def test_the_same_seed_merges_alike(net, no_grad, latents):
    xs = changing(latents, 4)
    options = {"merge_schedule": "linear:0.7:0.2", "merge_every": 2, "merge_share": True}
    first, again, other = (walked(tomesd.apply_patch(net, seed=seed, **options), xs)[0] for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_block_by_itself_does_not_follow_others(net):
    for options in ({"merge_schedule": "0:0.5"}, {"merge_every": 2}, {"merge_share": True}):
        tomesd.apply_patch(net, **options)
        with pytest.raises(ValueError, match="a block by itself cannot merge by"), tomesd.pinned(net, 0):
            pass
