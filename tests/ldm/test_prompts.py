"""Prompts with weights, in chunks, and with added vectors: what is parsed, which tokens are where, what is encoded."""

import logging
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders.chunks import Chunker, PromptStyle
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.prompt_syntax import parse_weights

TOKENIZER = Path(__file__).parents[2] / "models/ldm/shapes/tokenizer"
SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN, CHUNKS, CUT = PromptStyle(weights=False), PromptStyle(), PromptStyle(long="cut")


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = FrozenCLIPEmbedder(text_config=SIZES, tokenizer=TOKENIZER)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(autouse=True)
def without_vectors(encoder):
    yield
    encoder.set_vectors({})


def texts(encoder, chunks):
    """Return what is between start and end in each chunk."""
    tokenizer = encoder.tokenizer
    return [tokenizer.decode(chunk.ids[1 : chunk.ids.index(tokenizer.eos_id, 1)]) for chunk in chunks]


# --- syntax ------------------------------------------------------------------------------------------------


def test_weights_are_parsed_as_the_web_ui_does():
    cases = {
        "": [("", 1)],
        "a red circle": [("a red circle", 1)],
        "(a)": [("a", 1.1)],
        "((a))": [("a", 1.21)],
        "[a]": [("a", 1 / 1.1)],
        "[[a]]": [("a", 1 / 1.21)],
        "([a])": [("a", 1)],
        "(a:1.5)": [("a", 1.5)],
        "(a: .5 )": [("a", 0.5)],
        "(a:-1)": [("a", -1)],
        "a (big (red:1.3) dog) b": [("a ", 1), ("big ", 1.1), ("red", 1.43), (" dog", 1.1), (" b", 1)],
        r"a \(b\) \[c\]": [("a (b) [c]", 1)],
        r"a \\ b": [("a \\ b", 1)],
        r"a \b": [("a b", 1)],
        "(unclosed": [("unclosed", 1.1)],
        "[unclosed (twice": [("unclosed ", 1 / 1.1), ("twice", 1)],
        "unopened) a:1.2) b]": [("unopened) a:1.2) b]", 1)],
        "at 10:30 (b)": [("at 10:30 ", 1), ("b", 1.1)],
        "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
            ("a ", 1),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    }
    for prompt, expected in cases.items():
        pieces = [(piece.text, pytest.approx(piece.weight)) for piece in parse_weights(prompt)]
        assert pieces == expected, prompt
        assert not any(piece.begins for piece in parse_weights(prompt)), prompt


def test_break_begins_a_chunk_and_only_as_a_word_of_its_own():
    pieces = parse_weights("a BREAK (b) BREAKS, unBREAK break")
    assert [(piece.text, piece.begins) for piece in pieces] == [
        ("a", False),
        ("b", True),
        (" BREAKS, unBREAK break", False),
    ]
    assert [piece.begins for piece in parse_weights("a BREAK b")] == [False, True]


# --- chunks ------------------------------------------------------------------------------------------------


def test_prompts_of_a_chunk_have_the_tokens_they_always_had(encoder):
    for prompt in ("", "a red circle", "two black stars, a ring", "(brackets) [are] text"):
        (chunk,) = encoder.chunks(prompt, PLAIN)
        assert torch.equal(torch.tensor(chunk.ids), encoder.tokenize([prompt])[0]), prompt
        assert set(chunk.weights) == {1.0}
        context = encoder.encode_chunks([[chunk]])
        assert torch.equal(context, encoder.encode([prompt])), prompt


def test_weights_are_those_of_the_tokens(encoder):
    (chunk,) = encoder.chunks("a (red:1.5) [circle]", CHUNKS)
    pieces = encoder.tokenizer.encode("red")[1:-1], encoder.tokenizer.encode("circle")[1:-1]
    expected = [1, 1, *[1.5] * len(pieces[0]), *[1 / 1.1] * len(pieces[1])]
    assert list(chunk.weights) == pytest.approx(expected + [1] * (77 - len(expected)))
    assert chunk.ids == encoder.chunks("a red circle", CHUNKS)[0].ids


def test_weights_that_are_too_strong_are_told_once_and_those_that_draw_noise_refused(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encoder.chunks("a (red:2.5) (circle:-3) (on:2) [(blue:2.1)]", CHUNKS)
        encoder.chunks("a (red:2.5) star", PLAIN)  # text
    assert [record.getMessage() for record in caplog.records] == [
        "weight 2.5 of 'red': beyond 2 pictures fall apart, 0.5 to 1.5 is wise",
        "weight -3 of 'circle': beyond 2 pictures fall apart, 0.5 to 1.5 is wise",
    ]
    for prompt, weight in (("a (red:99999) star", "99999"), ("((red:-99):2)", "-198"), (f"(red:{'9' * 400})", "inf")):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=f"the weight of 'red' in a prompt is {weight}, which draws noise: 100 is"
            ):
                encoder.chunks(prompt, CHUNKS)
        assert encoder.chunks(prompt, PLAIN), prompt


def test_long_prompts_go_on_in_further_chunks_cut_at_a_comma_near_the_end(encoder):
    assert texts(encoder, encoder.chunks("red " * 76, CHUNKS)) == ["red " * 74 + "red", "red"]
    assert len(encoder.chunks("red " * 75, CHUNKS)) == 1 and len(encoder.chunks("red " * 151, CHUNKS)) == 3
    near = "red " * 60 + ", " + "blue " * 20  # the comma is 15 tokens before the end
    assert texts(encoder, encoder.chunks(near, CHUNKS)) == ["red " * 60 + ",", "blue " * 19 + "blue"]
    far = "red " * 40 + ", " + "blue " * 40
    assert texts(encoder, encoder.chunks(far, CHUNKS))[1] == "blue " * 5 + "blue"
    at_end = "red " * 75 + ", blue"
    assert texts(encoder, encoder.chunks(at_end, CHUNKS)) == ["red " * 74 + "red", ", blue"]


def test_break_fills_up_a_chunk(encoder):
    assert texts(encoder, encoder.chunks("red BREAK blue", CHUNKS)) == ["red", "blue"]
    assert texts(encoder, encoder.chunks("red BREAK", CHUNKS)) == ["red"]
    assert texts(encoder, encoder.chunks("BREAK red", CHUNKS)) == ["red"]
    assert texts(encoder, encoder.chunks("red BREAK blue", CUT)) == ["red blue"]
    assert len(encoder.chunks("red BREAK blue", PLAIN)) == 1


def test_what_is_cut_is_shown_in_full_and_once(encoder, caplog):
    prompt = "red " * 74 + "(circle, blue:1.2) star on green"
    with caplog.at_level(logging.WARNING):
        (chunk,) = encoder.chunks(prompt, CUT)
        encoder.chunks(prompt, CUT)
    assert texts(encoder, [chunk]) == ["red " * 74 + "circle"]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt longer than 77 tokens, its end is not seen: ', blue star on green'"
    ]


# --- contexts ----------------------------------------------------------------------------------------------


def test_weights_scale_the_states_and_the_mean_of_a_chunk_stays(encoder):
    plain = encoder.encode_chunks([encoder.chunks("a red circle", CHUNKS)]).double().numpy()[0]
    chunk = encoder.chunks("a (red:1.7) [circle]", CHUNKS)[0]
    weighted = plain * torch.tensor(chunk.weights, dtype=torch.float64).numpy()[:, None]
    expected = weighted * plain.mean() / weighted.mean()
    for others in ([], ["a blue star"], ["(a:0.3)"]):  # a prompt's context depends on no other one's
        batch = [[chunk], *(encoder.chunks(text, CHUNKS) for text in others)]
        torch.testing.assert_close(
            encoder.encode_chunks(batch)[0].double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4
        )


def test_each_chunk_is_encoded_by_itself(encoder):
    both = encoder.encode_chunks([encoder.chunks("a red circle BREAK a (blue:1.4) star", CHUNKS)])
    assert both.shape == (1, 154, 24)
    parts = [encoder.encode_chunks([encoder.chunks(text, CHUNKS)]) for text in ("a red circle", "a (blue:1.4) star")]
    torch.testing.assert_close(both, torch.cat(parts, dim=1))
    with pytest.raises(ValueError, match="1, 2"):
        encoder.encode_chunks([encoder.chunks(text, CHUNKS) for text in ("a", "a BREAK b")])


# --- added vectors -----------------------------------------------------------------------------------------


def test_a_name_stands_for_its_vectors(encoder):
    """The reference is a tower whose table of embeddings has the vectors as further rows."""
    vectors = {"my-style": torch.randn(3, 24), "<cat>": torch.randn(1, 24)}
    encoder.set_vectors(vectors)
    size = encoder.transformer.text_model.config.vocab_size
    (chunk,) = encoder.chunks("a red circle in (My-Style:1.2), <cat>", CHUNKS)
    found = [(id_ - size, weight) for id_, weight in zip(chunk.ids, chunk.weights, strict=True) if id_ >= size]
    assert found == [(0, 1.2), (1, 1.2), (2, 1.2), (3, 1.0)]
    plain = [id_ for id_ in chunk.ids if id_ < size]
    assert plain == list(encoder.chunks("a red circle in ,", PLAIN)[0].ids[: len(plain)])

    table = encoder.transformer.text_model.embeddings.token_embedding
    (unweighted,) = encoder.chunks("a red circle in My-Style, <cat>", CHUNKS)
    context = encoder.encode_chunks([[unweighted]])
    longer = torch.nn.Embedding.from_pretrained(torch.cat([table.weight, *vectors.values()]))
    encoder.transformer.text_model.embeddings.token_embedding = longer
    try:
        expected = encoder.transformer(torch.tensor([unweighted.ids]))
    finally:
        encoder.transformer.text_model.embeddings.token_embedding = table
    assert torch.equal(context, expected)


def test_names_are_found_as_words_of_their_own_only(encoder):
    encoder.set_vectors({"ring": torch.randn(1, 24), "ringer": torch.randn(2, 24)})
    size = encoder.transformer.text_model.config.vocab_size
    counts = {"a ring": 1, "a spring": 0, "rings": 0, "RING, ring.": 2, "ringer": 2, "(ring)s": 1, "": 0}
    for prompt, count in counts.items():
        assert sum(id_ >= size for id_ in encoder.chunks(prompt, CHUNKS)[0].ids) == count, prompt


def test_vectors_stay_in_one_chunk(encoder):
    encoder.set_vectors({"style": torch.randn(5, 24)})
    chunks = encoder.chunks("red " * 72 + "style blue", CHUNKS)
    assert [len(set(chunk.ids)) for chunk in chunks] == [1 + 1 + 1, 1 + 5 + 1 + 1]
    assert Chunker(encoder.tokenizer, 77, {"style": range(5)}).split("red " * 72 + "style", CUT)[1] == "style"


def test_vectors_of_another_width_or_too_many_are_refused(encoder):
    with pytest.raises(ValueError, match="width 32, the text encoder 24"):
        encoder.set_vectors({"a": torch.randn(1, 32)})
    with pytest.raises(ValueError, match=r"76 vectors: a prompt has room for 1\.\.75"):
        encoder.set_vectors({"a": torch.randn(76, 24)})
