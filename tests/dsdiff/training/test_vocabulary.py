"""The embedded model's vocabulary: complete, minimal, reproducible."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from dsdiff.training.vocabulary import build_vocabulary, grammar_words, learn_merges, merge_pair
from ldm.data.shapes import ShapesDataset, caption

COMMITTED = Path(__file__).resolve().parents[3] / "models/ldm/shapes/tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(str(COMMITTED), local_files_only=True)


def test_each_word_of_the_grammar_is_one_token(tokenizer):
    assert {word: tokenizer.tokenize(word) for word in grammar_words()} == {
        word: [word + "</w>"] for word in grammar_words()
    }


def test_captions_take_a_token_per_word(tokenizer):
    datasets = [ShapesDataset(50, split) for split in ("train", "heldout")]
    for text in (caption(dataset.spec(index)) for dataset in datasets for index in range(50)):
        assert len(tokenizer(text)["input_ids"]) == len(text.split()) + 2, text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_any_text_can_be_encoded(tokenizer):
    text = "zwölf 日本 🙂 xyz"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_upper_case_is_folded(tokenizer):
    assert tokenizer("A RED Circle")["input_ids"] == tokenizer("a red circle")["input_ids"]


def test_special_tokens_come_last(tokenizer):
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (624, 622, 623)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer("")["input_ids"] == [622, 623]


def test_ids_are_dense():
    vocabulary = json.loads((COMMITTED / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(624))


def test_merging_stops_when_every_word_is_one_symbol():
    merges = learn_merges(["aba", "ab", "ba"])
    assert merges == [("b", "a</w>"), ("a", "b</w>"), ("a", "ba</w>")]
    assert len(build_vocabulary(merges)) == 256 + 256 + 3 + 2


def test_merge_pair_goes_from_the_left():
    assert merge_pair(["a", "a", "a", "b"], ("a", "a")) == ["aa", "a", "b"]
