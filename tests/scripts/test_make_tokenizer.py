"""The command that writes the embedded model's tokenizer: the committed files, to the byte."""

from pathlib import Path

import pytest

from scripts.make_tokenizer import main

COMMITTED = Path(__file__).resolve().parents[2] / "models/ldm/shapes/tokenizer"
NAMES = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}


def test_the_committed_files_are_what_the_command_writes(tmp_path, capsys):
    main(["--outdir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == NAMES == {path.name for path in COMMITTED.iterdir()}
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes(), name
    assert capsys.readouterr().out == f"{tmp_path}: 624 tokens\n"


def test_an_outdir_that_cannot_be_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["--outdir", str(tmp_path / "file" / "tokenizer")])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: cannot write to")
