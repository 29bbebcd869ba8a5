"""Files in JSON lines: rows with settings of their own, and what is refused by file and line."""

import json

import pytest

from dsdiff import DrawOptions
from dsdiff.prompt_rows import Row, has_rows, read_rows


@pytest.fixture
def file(tmp_path):
    """file(*lines) -> the path of a .jsonl file; lines that are no text become JSON."""

    def write(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_rows_have_what_their_lines_say(file):
    full = {"prompt": "a", "negative": "b", "seed": 7, "steps": 20, "scale": 5, "size": [512, 768]}
    rows = read_rows(
        file({"prompt": "a ring"}, "", full, {"prompt": "c", "size": "64x32", "seed": None}), "--from-file"
    )
    assert rows == (
        Row(prompt="a ring", line=1),
        Row(prompt="a", negative="b", seed=7, steps=20, scale=5, size=(512, 768), line=3),
        Row(prompt="c", size=(64, 32), line=4),
    )
    common = DrawOptions(steps=10, negative_prompt="common", sampler="euler")
    assert rows[0].options(common) == common
    own = rows[1].options(common)
    assert (own.steps, own.negative_prompt, own.scale, own.width, own.height) == (20, "b", 5, 512, 768)
    assert own.sampler == "euler" and rows[2].options(common).negative_prompt == "common"


def test_what_is_wrong_is_refused_with_its_file_and_line(file):
    cases = {
        "a red circle": "no JSON",
        '["a"]': "it holds a list, no object",
        '{"seed": 3}': "there is no prompt",
        '{"prompt": null}': "prompt is None",
        '{"prompt": " "}': "prompt is ' ': it must be a text",
        '{"prompt": "a", "sampler": "ddim"}': "'sampler' is unknown: a row has prompt, negative, seed, steps",
        '{"prompt": "a", "negative": 3}': "negative is 3",
        '{"prompt": "a", "seed": -1}': "seed is -1",
        '{"prompt": "a", "seed": true}': "seed is True",
        '{"prompt": "a", "steps": 2.5}': "steps is 2.5",
        '{"prompt": "a", "scale": "7"}': "scale is '7'",
        '{"prompt": "a", "size": 64}': "size is 64",
        '{"prompt": "a", "size": [64]}': "size is [64]",
        '{"prompt": "a", "size": [64, 0]}': "size is [64, 0]",
        '{"prompt": "a", "size": "big"}': "size is 'big'",
    }
    for line, message in cases.items():
        path = file({"prompt": "fine"}, line)
        with pytest.raises(ValueError) as error:
            read_rows(path, "--from-file")
        text = str(error.value)
        assert text.startswith(f"--from-file {str(path)!r}, line 2: ") and message in text, text
        assert "\n" not in text
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(file(""), "--from-file")


def test_files_are_told_by_their_names(tmp_path):
    assert has_rows(tmp_path / "a.jsonl") and has_rows(tmp_path / "a.NDJSON")
    assert not has_rows(tmp_path / "a.txt") and not has_rows(None)
