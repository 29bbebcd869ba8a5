"""Attention for training against PyTorch's."""

import torch
import torch.nn.functional as F

from ldm.modules.attention import CrossAttention
from ldm.modules.training_attention import AttentionByHeads


def test_values_and_gradients_are_those_of_pytorchs_attention():
    generator = torch.Generator().manual_seed(0)
    for tokens, context, dtype, tolerance in ((40, 40, torch.float64, 1e-12), (40, 7, torch.float32, 1e-5)):
        shapes = ((2, 3, tokens, 8), (2, 3, context, 8), (2, 3, context, 8))
        inputs = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        grad = torch.randn(shapes[0], generator=generator, dtype=dtype)
        results = []
        for attention in (
            lambda q, k, v: AttentionByHeads.apply(q, k, v, 0.3),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = attention(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradcheck():
    leaves = [torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5)]
    assert torch.autograd.gradcheck(lambda q, k, v: AttentionByHeads.apply(q, k, v, 0.5), leaves)


def test_a_module_trains_in_bfloat16_as_it_draws():
    torch.manual_seed(0)
    attention = CrossAttention(16, context_dim=12, heads=2, dim_head=8)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        trained = attention.train()(x, context)
        drawn = attention.eval()(x, context)
    trained.float().square().mean().backward()
    assert "AttentionByHeads" in _history(trained)
    assert (trained - drawn).abs().max() < 0.02 * drawn.abs().max()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_a_float_mask_is_added_to_the_scores():
    torch.manual_seed(0)
    attention = CrossAttention(16, context_dim=12, heads=2, dim_head=8).double()
    x, context = torch.randn(2, 9, 16).double(), torch.randn(2, 4, 12).double()
    mask = torch.randn(2, 4).double()
    trained = attention.train()(x, context, mask)
    assert "AttentionByHeads" in _history(trained)
    torch.testing.assert_close(trained, attention.eval()(x, context, mask), rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(attention.parameters()))
        for out in (attention.train()(x, context, mask), attention.eval()(x, context, mask))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def _history(x: torch.Tensor) -> str:
    """Return the names of all functions that x came from."""
    names, functions = [], [x.grad_fn]
    while functions:
        function = functions.pop()
        if function is not None:
            names.append(type(function).__name__)
            functions += [before for before, _ in function.next_functions]
    return " ".join(names)
