"""The text tower against transformers' CLIPTextModel, bit for bit."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.half_storage import keep_in_half
from ldm.modules.encoders.clip import ClipTextConfig, ClipTextModel, position_ids

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = json.loads((GOLDENS / "clip_text_tiny.json").read_text())
SIZES = {
    "embedded model": {
        "vocab_size": 624,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "two layers of ViT-L/14": {
        "vocab_size": 1000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
    },
}


@pytest.fixture
def threads():
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(fields):
    """(transformers' tower, ours) with the same random weights; no bias is zero and no norm the identity."""
    fields = fields | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = CLIPTextModel(CLIPTextConfig(**fields)).eval()
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    ours = ClipTextModel(ClipTextConfig.from_fields(fields)).eval()
    ids = {"text_model.embeddings.position_ids": position_ids(fields.get("max_position_embeddings", 77))}
    weights = {f"text_model.{name}": value for name, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(ids) + list(weights)
    ours.load_state_dict(weights | ids)
    return theirs, ours


@torch.no_grad()
def test_it_equals_transformers_bit_for_bit(threads):
    for (name, sizes), act in itertools.product(SIZES.items(), ("quick_gelu", "gelu")):
        theirs, ours = pair(sizes | {"hidden_act": act})
        for count, shape in itertools.product((1, 2), ((1, 77), (2, 77), (3, 32), (1, 1))):
            torch.set_num_threads(count)
            ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
            expected = theirs(input_ids=ids).last_hidden_state
            assert torch.equal(ours(ids), expected), (name, act, count, shape)


@torch.no_grad()
def test_half_storage_equals_transformers_bit_for_bit():
    theirs, ours = pair(SIZES["embedded model"])
    ids = torch.randint(624, (2, 77), generator=torch.Generator().manual_seed(1))
    expected = keep_in_half(theirs)(input_ids=ids).last_hidden_state
    assert torch.equal(keep_in_half(ours)(ids), expected)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float16}


def test_gradients_equal_those_of_transformers():
    theirs, ours = pair(TINY)
    ids = torch.randint(TINY["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    theirs.train()(input_ids=ids).last_hidden_state.square().sum().backward()
    ours.train()(ids).square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_a_token_does_not_see_those_after_it():
    _, ours = pair(SIZES["embedded model"])
    first = torch.randint(624, (1, 20), generator=torch.Generator().manual_seed(1))
    second = first.clone()
    second[:, 12] = (second[:, 12] + 1) % 624
    a, b = ours(first), ours(second)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_new_weights_have_the_deviations_of_transformers():
    for factor in (1.0, 0.5):
        fields = SIZES["two layers of ViT-L/14"] | {"initializer_factor": factor}
        theirs = CLIPTextModel(CLIPTextConfig(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=2))
        ours = ClipTextModel(ClipTextConfig.from_fields(fields))
        for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if a.ndim == 1:
                assert torch.equal(a, b), name
            else:
                assert abs(b.std() / a.std() - 1) < 0.02 and abs(b.mean()) < 0.01 * b.std(), (name, factor)


def test_every_field_of_transformers_is_known():
    """A whole text_config of the hub is accepted at its defaults; its sizes reach the tower."""
    fields = CLIPTextConfig(hidden_size=96, attention_dropout=0.25).to_dict()
    config = ClipTextConfig.from_fields(fields)
    assert (config.hidden_size, config.num_attention_heads, config.attention_dropout) == (96, 8, 0.25)
    assert ClipTextConfig.from_fields({}) == ClipTextConfig.from_fields({"hidden_size": 768, "projection_dim": 5})
