"""Switching token merging on and off, and the draws of destinations."""

import copy

import pytest
import torch

import tomesd

# The way in and the way out


def test_remove_patch_restores_everything(net, no_grad, output, everything):
    output_before, modules_before = output(net), everything(net)
    state_before = {key: value.clone() for key, value in net.state_dict().items()}
    tomesd.apply_patch(net, merge_crossattn=True, merge_mlp=True)
    assert not torch.equal(output(net), output_before)
    assert tomesd.remove_patch(net) is net
    assert everything(net) == modules_before
    assert torch.equal(output(net), output_before)
    assert net.state_dict().keys() == state_before.keys()
    assert all(torch.equal(value, state_before[key]) for key, value in net.state_dict().items())


def test_a_patched_model_has_the_classes_modules_and_state_it_had(net, no_grad, output):
    def structure():
        return [(name, type(module)) for name, module in net.named_modules()], list(net.state_dict())

    before = structure()
    tomesd.apply_patch(net, merge_crossattn=True, merge_mlp=True)
    output(net)
    assert structure() == before
    assert hasattr(net.fine, "token_merging") and hasattr(net.coarse, "token_merging")
    tomesd.remove_patch(net)
    assert not hasattr(net.fine, "token_merging") and not hasattr(net.coarse, "token_merging")


def test_foreign_hooks_survive_in_their_order(net, no_grad, output, everything):
    calls = []

    def register(when):
        for place in (net, net.fine, net.fine.attn1):
            place.register_forward_pre_hook(lambda *_: calls.append(f"{when} pre"))
            place.register_forward_hook(lambda *_: calls.append(f"{when} post"), always_call=True)
            place.register_forward_pre_hook(lambda *_: calls.append(f"{when} kwargs"), with_kwargs=True)

    register("first")
    twin = copy.deepcopy(net)
    expected = output(twin), list(calls)
    before = everything(net)
    tomesd.remove_patch(net)  # not patched: left alone
    assert everything(net) == before
    tomesd.apply_patch(net)
    register("second")
    tomesd.remove_patch(net)
    assert [entry[:3] for entry in everything(net)] == [entry[:3] for entry in before]
    for (name, *_, hooks), (*_, hooks_before) in zip(everything(net), before, strict=True):
        for now, then in zip(hooks, hooks_before, strict=True):
            assert now[: len(then)] == then and len(now) == 2 * len(then), name
    calls.clear()
    assert torch.equal(output(net), expected[0])
    assert [call for call in calls if call.startswith("first")] == expected[1]
    assert calls.index("first pre") < calls.index("second pre")


def test_a_second_patch_replaces_the_first(net, no_grad, output, everything):
    fresh = output(tomesd.apply_patch(copy.deepcopy(net), ratio=0.25, use_rand=False))
    before = everything(net)
    tomesd.apply_patch(net, ratio=0.75, max_downsample=2, merge_mlp=True)
    tomesd.apply_patch(net, ratio=0.25, use_rand=False)
    assert torch.equal(output(net), fresh)
    assert len(net._forward_pre_hooks) == len(net.fine.attn1._forward_pre_hooks) == 1
    assert everything(tomesd.remove_patch(net)) == before


def test_ratio_zero_changes_nothing(net, no_grad, output):
    before = output(net)
    assert torch.equal(output(tomesd.apply_patch(net, ratio=0)), before)


def test_a_copy_of_a_patched_model_is_independent(net, no_grad, output, everything):
    plain, names = output(net), [entry[:3] for entry in everything(net)]
    tomesd.apply_patch(net, seed=4)
    output(net)  # also after a forward
    twin = copy.deepcopy(net)
    assert twin.fine.token_merging.model is twin.coarse.token_merging.model is not net.fine.token_merging.model
    expected = output(net)
    assert torch.equal(output(twin), expected)
    tomesd.remove_patch(net)
    assert torch.equal(output(net), plain)
    assert tomesd.token_report(twin)[0].tokens_processed == 32
    with pytest.raises(ValueError, match="has no merged tokens"):
        tomesd.token_report(net)
    tomesd.remove_patch(twin)
    assert torch.equal(output(twin), plain)
    assert [entry[:3] for entry in everything(twin)] == names
    assert not any(hooks for *_, kinds in everything(twin) for hooks in kinds)


def test_use_before_apply_patch_is_refused(net):
    with pytest.raises(ValueError, match=r"call tomesd\.apply_patch first"):
        tomesd.token_report(net)
    with pytest.raises(ValueError, match=r"call tomesd\.apply_patch first"):
        tomesd.reseed(net, 0)
    with pytest.raises(ValueError, match="no merged tokens"), tomesd.pinned(net, 5):
        pass


def test_seeds_out_of_range_are_refused(net):
    tomesd.apply_patch(net)
    with pytest.raises(ValueError, match="seed is -1"):
        tomesd.reseed(net, -1)
    with pytest.raises(ValueError, match="seed is 9223372036854775808"), tomesd.pinned(net, 2**63):
        pass


# Randomness


def test_same_seed_same_output_and_another_seed_another(net, no_grad, output):
    first, again, other = (output(tomesd.apply_patch(net, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forwards_differ_until_reseeded(net, no_grad, output):
    tomesd.apply_patch(net, seed=5)
    first, second = output(net), output(net)
    tomesd.reseed(net, 5)
    assert torch.equal(output(net), first)
    assert not torch.equal(first, second)


def test_the_global_generator_is_neither_read_nor_advanced(net, no_grad, output):
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


def test_odd_batches_are_never_random(net, no_grad, output, latents):
    for batch in (1, 2, 3, 4):
        chosen = output(tomesd.apply_patch(net, use_rand=True), latents(batch))
        fixed = output(tomesd.apply_patch(net, use_rand=False), latents(batch))
        assert torch.equal(chosen, fixed) is (batch % 2 == 1), batch


def test_equal_samples_of_a_guided_batch_merge_alike(net, no_grad, output, latents):
    tomesd.apply_patch(net)
    out = output(net, latents(1).repeat(2, 1, 1, 1))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)


def test_a_block_by_itself_merges_as_in_the_forward_before(net, no_grad, output):
    tomesd.apply_patch(net)
    recorded = {}
    hook = net.fine.register_forward_hook(lambda module, args, out: recorded.update(x=args[0], out=out))
    output(net)
    hook.remove()
    assert torch.equal(net.fine(recorded["x"]), recorded["out"])


# Pinned draws


def test_pinned_draws_are_the_same_in_all_forwards_and_batches(net, no_grad, output, latents):
    x = latents(4)
    tomesd.apply_patch(net, seed=3)
    with tomesd.pinned(net, 5):
        whole = output(net, x)
        assert torch.equal(output(net, x), whole)
        for part in (x[:1], x[:3]):  # odd batches, otherwise never random
            torch.testing.assert_close(output(net, part), whole[: len(part)], rtol=0, atol=1e-6)
    with tomesd.pinned(net, 6):
        assert not torch.equal(output(net, x), whole)


def test_after_pinned_draws_forwards_differ_again_and_odd_batches_are_not_random(net, no_grad, output, latents):
    tomesd.apply_patch(net, seed=3)
    with pytest.raises(RuntimeError, match="on the way"), tomesd.pinned(net, 5):
        output(net)
        raise RuntimeError("on the way")
    assert not torch.equal(output(net), output(net))
    odd = output(net, latents(1))
    assert torch.equal(odd, output(tomesd.apply_patch(net, use_rand=False), latents(1)))
