"""The tokenizer against transformers' CLIPTokenizer, for every layout of its files."""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from ldm.data.shapes import ShapesDataset, caption
from ldm.modules.encoders.tokenizer import ClipTokenizer

SHAPES = Path(__file__).parents[2] / "models/ldm/shapes/tokenizer"

# fmt: off
ODD = (
    "", " ", "  a red\t\ncircle ", "A RED Circle", "\r\n\r\n", "\u3000wide\u00a0and no-break\u2003spaces",
    "\u00e9 \u00e8 \u00fc \u00f1", "e\u0301 cafe\u0301", "zw\u00f6lf \u65e5\u672c \U0001f642 xyz",
    "\u0130stanbul \u00df \u017f \u03a3\u03b1\u03c2 \ufb01", "\u00bd \u00b2 \u2167 123 4567", "\ufdfa",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "I'm don't we've you'll he'd they're it's 'S 'T", "'s", "''", "'ll'",
    "<b>red</b> &amp; &lt;", "<|start", "of text|>", "</w>", "a red circle</w>", "under_score-hyphen/slash",
    "a\x00b\x01c\x7f\x1b[0m", "\u200b\u200d\ufeff", "...,,;;??!!", "a!b !! ! ", "$100 \u20ac5 \u00a5",
    "a" * 300, "red " * 200, "x" * 10_000,
    "<|startoftext|>", "a<|endoftext|>b", "<|endoftext|>a<|endoftext|>", " <|endoftext|> ",
    "<|STARTOFTEXT|> <|EndOfText|>",
)
# fmt: on


def texts() -> list[str]:
    """Odd texts, captions, and 300 random ones of letters, accents, signs, emoji and special tokens."""
    rng = random.Random(0)
    ranges = ((0, 0x250), (0x300, 0x370), (0x400, 0x460), (0x2000, 0x2070), (0x4E00, 0x4E30), (0x1F600, 0x1F640))
    letters = [chr(code) for start, end in ranges for code in range(start, end)]
    words = ["a", "red", "circle", "above", "blue", "star", "<|endoftext|>", "!", "'s", " ", "  "]
    drawn = ["".join(rng.choice(rng.choice((letters, words))) for _ in range(rng.randint(1, 40))) for _ in range(300)]
    return [*ODD, *(caption(ShapesDataset(20).spec(index)) for index in range(20)), *drawn]


def token(content: str, normalized: bool, **more) -> dict:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized} | more


START, END = "<|startoftext|>", "<|endoftext|>"
AS_SD_1 = {"bos_token": token(START, True), "eos_token": token(END, True), "unk_token": token(END, True)}
# Name of a layout -> the two settings files beside the vocabulary: (tokenizer_config, special_tokens_map).
LAYOUTS = {
    "vocabulary alone": (None, None),
    "Stable Diffusion 1": (
        {name: value | {"__type": "AddedToken"} for name, value in AS_SD_1.items()} | {"pad_token": END},
        AS_SD_1 | {"pad_token": END},
    ),
    "Stable Diffusion 2": ({"pad_token": "!"}, AS_SD_1 | {"pad_token": "!"}),
    "newest": (
        {
            "added_tokens_decoder": {
                "0": token("!", False, special=True),
                "622": token(START, True, special=True),
                "623": token(END, False, special=True),
            },
            **{"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"},
        },
        None,
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Name of a layout -> directory with its files; each also as the one file that transformers, or we, write."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"embedded model": SHAPES}
    for number, (name, settings) in enumerate(LAYOUTS.items()):
        made[name] = root / str(number)
        made[name].mkdir()
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(SHAPES / file, made[name])
        for file, content in zip(("tokenizer_config.json", "special_tokens_map.json"), settings, strict=True):
            if content is not None:
                (made[name] / file).write_text(json.dumps(content))
    for number, (name, source) in enumerate(list(made.items())):
        theirs, ours, alone = (root / f"{number} {kind}" for kind in ("theirs", "ours", "alone"))
        CLIPTokenizer.from_pretrained(source).save_pretrained(theirs)
        ours.mkdir()
        ClipTokenizer.from_directory(source).save(ours)
        alone.mkdir()
        shutil.copy(ours / "tokenizer.json", alone)
        made |= {f"{name}, saved by transformers": theirs, f"{name}, saved by us": ours, f"{name}, one file": alone}
    return made


def test_ids_and_texts_are_those_of_transformers(directories):
    for name, directory in directories.items():
        theirs = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        ours = ClipTokenizer.from_directory(directory)
        assert len(ours) == len(theirs) == 624, name
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id), name
        assert ours.pad_id == theirs.pad_token_id, name
        for text in texts():
            ids = theirs(text, verbose=False)["input_ids"]
            assert ours.encode(text) == ids, (name, text)
            assert ours.decode(ids[1:-1]) == theirs.decode(ids[1:-1]), (name, text)
            skipped = ours.decode(ids, skip_special_tokens=True)
            assert skipped == theirs.decode(ids, skip_special_tokens=True), (name, text)


def test_saving_keeps_the_tokenizer(directories, tmp_path):
    for number, (name, directory) in enumerate(directories.items()):
        ours = ClipTokenizer.from_directory(directory)
        (tmp_path / str(number)).mkdir()
        ours.save(tmp_path / str(number))
        again = ClipTokenizer.from_directory(tmp_path / str(number))
        assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id), name
        assert [again.encode(text) for text in ODD] == [ours.encode(text) for text in ODD], name


def test_older_single_files_hold_merges_as_text(directories, tmp_path):
    content = json.loads((directories["embedded model, one file"] / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = ClipTokenizer.from_directory(SHAPES)
    assert [ClipTokenizer.from_directory(tmp_path).encode(text) for text in ODD] == [*map(expected.encode, ODD)]


def test_damaged_files_are_refused_in_one_line(directories, tmp_path):
    whole = (directories["embedded model, one file"] / "tokenizer.json").read_text()
    merges = (SHAPES / "merges.txt").read_text()
    for number, files in enumerate(
        (
            {"vocab.json": "not json", "merges.txt": "#version: 0.2\na b\n"},
            {"vocab.json": '{"a": 0}', "merges.txt": merges},
            {"vocab.json": "[]", "merges.txt": ""},
            {"vocab.json": (SHAPES / "vocab.json").read_text(), "merges.txt": "#version: 0.2\na\n"},
            {"tokenizer.json": "{}"},
            {"tokenizer.json": whole[: len(whole) // 2]},
            {"tokenizer.json": "[1]"},
            {"tokenizer.json": whole, "tokenizer_config.json": "["},
            {"tokenizer.json": whole, "tokenizer_config.json": '{"bos_token": 5}'},
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_text(content)
        with pytest.raises(ValueError, match="cannot be read") as error:
            ClipTokenizer.from_directory(directory)
        assert "\n" not in str(error.value) and repr(str(directory)) in str(error.value), files.keys()
