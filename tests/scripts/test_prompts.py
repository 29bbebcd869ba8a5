"""Prompts of scripts/txt2img.py: weights, long ones, embeddings, and rows in JSON lines; what is recorded of them."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from scripts import txt2img

ONCE = ["--n_iter", "1", "--n_samples", "1"]
LONG = "a red circle, " * 30 + "a blue star"


@pytest.fixture
def run(run_tiny):
    """run(*flags) -> outdir; no grid is drawn."""
    return lambda *flags, **more: run_tiny(txt2img, "--ddim_steps", 2, "--skip_grid", *flags, **more)


def picture(folder, i=0):
    return np.asarray(Image.open(folder / f"samples/{i:05}.png")).astype(int)


def told(folder, i=0):
    return json.loads(Image.open(folder / f"samples/{i:05}.png").info["dsdiff"])


def difference(a, b):
    return np.abs(a - b).max()


# --- weights, long prompts, embeddings ---------------------------------------------------------------------


@pytest.mark.slow
def test_weights_reach_the_picture_unless_they_are_switched_off(run):
    plain = picture(run(*ONCE, outdir="plain"))
    weighted = picture(run(*ONCE, "--prompt", "a (red:1.5) circle", outdir="weighted"))
    assert difference(weighted, plain) > 0
    assert (picture(run(*ONCE, "--prompt", "a (red:1.0) circle", outdir="one")) == plain).all()
    off = run(*ONCE, "--prompt", "a (red:1.0) circle", "--no-prompt_weights", outdir="off")
    assert difference(picture(off), plain) > 0 and told(off)["prompt_weights"] is False
    negative = picture(run(*ONCE, "--negative_prompt", "(blue:1.5)", outdir="negative"))
    assert difference(negative, picture(run(*ONCE, "--negative_prompt", "blue", outdir="plain negative"))) > 0


def test_weights_that_draw_noise_are_refused_before_anything_is_drawn(refused, rows, tmp_path):
    noise = "a (red:500) circle"
    (tmp_path / "prompts.txt").write_text(f"a ring\n{noise}\n")
    for flags in (
        ("--prompt", noise),
        ("--negative_prompt", noise),
        ("--from-file", tmp_path / "prompts.txt"),
        ("--from-file", rows({"prompt": "a"}, {"prompt": "a", "negative": noise})),
    ):
        assert "the weight of 'red' in a prompt is 500, which draws noise" in refused(*flags), flags
    assert not (tmp_path / "refused").exists()


def test_long_prompts_are_read_whole_or_cut_with_a_warning(run, capsys):
    whole, cut = (run(*ONCE, "--prompt", LONG, "--long_prompts", way, outdir=way) for way in ("chunk", "cut"))
    out = capsys.readouterr()
    assert "warning: prompt longer than 32 tokens, its end is not seen: " in out.out + out.err
    assert difference(picture(whole), picture(cut)) > 0
    assert (told(whole)["long_prompts"], told(cut)["long_prompts"]) == ("chunk", "cut")
    short = "a red circle, " * 30 + "a green star"  # differs in what is cut off
    assert (picture(run(*ONCE, "--prompt", short, "--long_prompts", "cut", outdir="b")) == picture(cut)).all()
    assert difference(picture(run(*ONCE, "--prompt", short, outdir="c")), picture(whole)) > 0


@pytest.mark.slow
def test_pictures_do_not_depend_on_how_long_the_others_of_a_batch_are(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a ring\n{LONG}\na star\n")
    flags = ("--from-file", file, "--n_iter", 1, "--ddim_eta", 1, "--ratio", 0.5)
    together, alone = run(*flags, "--n_samples", 3, outdir="a"), run(*flags, "--n_samples", 1, outdir="b")
    assert all(difference(picture(together, i), picture(alone, i)) <= 1 for i in range(3))
    long_negative = run(*ONCE, "--negative_prompt", LONG, outdir="negative")
    assert difference(picture(long_negative), picture(run(*ONCE, "--negative_prompt", "a star", outdir="short"))) > 0


def test_embeddings_are_recorded_and_a_run_resumes_with_the_same_only(run, refused, tmp_path):
    for name, seed in (("mark", 0), ("other", 1)):
        vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(seed))
        torch.save({"string_to_param": {"*": vectors}}, tmp_path / f"{name}.pt")
    flags = (*ONCE, "--prompt", "a mark")
    outdir = run(*flags, "--embedding", tmp_path / "mark.pt")
    assert difference(picture(outdir), picture(run(*flags, outdir="plain"))) > 0
    settings = yaml.safe_load((outdir / "settings.yaml").read_text())
    (record,) = settings["embeddings"]
    assert (record["name"], record["vectors"], len(record["sha256"])) == ("mark", 2, 64)
    assert f'TI hashes: "mark: {record["sha256"][:12]}"' in Image.open(outdir / "samples/00000.png").info["parameters"]
    run(*flags, "--embedding", tmp_path / "mark.pt", "--resume")
    said = refused(*flags, "--embedding", f"{tmp_path / 'other.pt'}:mark", "--resume", outdir="out")
    assert "embeddings" in said
    wide = tmp_path / "wide.pt"
    torch.save({"string_to_param": {"*": torch.randn(2, 768)}}, wide)
    assert "vectors of width 768, the model's text encoder has 128" in refused(*flags, "--embedding", wide)


def test_an_embedding_that_no_prompt_names_is_told(run, tmp_path, capsys):
    torch.save({"string_to_param": {"*": torch.randn(2, 128)}}, tmp_path / "mark.pt")
    for prompt, flags, told in (
        ("a (Mark:1.2)", (), False),
        ("a ring", ("--negative_prompt", "mark"), False),
        ("a marker", (), True),
    ):
        run(*ONCE, "--prompt", prompt, *flags, "--embedding", tmp_path / "mark.pt")
        assert ("no prompt has the word 'mark'" in "".join(capsys.readouterr())) == told, prompt


def test_runs_of_older_versions_resume_where_prompts_read_alike(run, refused, tmp_path):
    for prompt, fits in (("a red circle", True), ("a (red) circle", False), (LONG, False)):
        outdir = run(*ONCE, "--prompt", prompt, outdir=prompt[:8])
        path = outdir / "settings.yaml"
        settings = yaml.safe_load(path.read_text())
        for name in ("prompt_weights", "long_prompts", "embeddings", "init", "rows", "inits", "mask"):
            del settings[name]
        path.write_text(yaml.safe_dump(settings))
        flags = (*ONCE, "--prompt", prompt, "--resume")
        if fits:
            run(*flags, outdir=prompt[:8])
        else:
            assert "other settings" in refused(*flags, outdir=prompt[:8])
            run(*flags, "--no-prompt_weights", "--long_prompts", "cut", outdir=prompt[:8])


# --- rows --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """rows(*rows) -> the path of a file that holds them."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


ROWS = (
    {"prompt": "a ring"},
    {"prompt": "a star", "seed": 7, "negative": "blue", "steps": 3, "scale": 2},
    {"prompt": "a heart", "size": [32, 64]},
    {"prompt": "a cross", "size": "32x64"},
)


def test_each_row_is_drawn_by_its_own_settings(run, rows):
    outdir = run("--from-file", rows(*ROWS))
    assert len(list((outdir / "samples").iterdir())) == 4
    sizes = [Image.open(outdir / f"samples/{i:05}.png").size for i in range(4)]
    assert sizes == [(48, 32), (48, 32), (32, 64), (32, 64)]
    facts = told(outdir, 1)
    expected = {"seed": 7, "negative_prompt": "blue", "steps": 3, "scale": 2.0, "prompt": "a star"}
    assert {name: facts[name] for name in expected} == expected and "rows" not in facts
    assert "Negative prompt: blue\nSteps: 3," in Image.open(outdir / "samples/00001.png").info["parameters"]
    own = ("--prompt", "a star", "--seed", 7, "--negative_prompt", "blue", "--ddim_steps", 3, "--scale", 2)
    assert (picture(run(*ONCE, *own, outdir="own")) == picture(outdir, 1)).all()
    own = ("--prompt", "a cross", "--seed", 45, "--W", 32, "--H", 64)
    assert difference(picture(run(*ONCE, *own, outdir="size")), picture(outdir, 3)) <= 1
    settings = yaml.safe_load((outdir / "settings.yaml").read_text())
    assert settings["rows"][:2] == [{}, {"seed": 7, "negative": "blue", "steps": 3, "scale": 2}]


def test_rounds_of_rows_have_seeds_of_their_own(run, rows):
    outdir = run("--from-file", rows(*ROWS[:2]), "--n_iter", 2)
    assert [told(outdir, i)["seed"] for i in range(4)] == [42, 7, 44, 8]


def test_rows_of_several_sizes_make_a_grid(run_tiny, rows):
    outdir = run_tiny(txt2img, "--ddim_steps", 2, "--from-file", rows(*ROWS), "--n_rows", 2)
    assert Image.open(outdir / "grid-0000.png").size == (2 * 50 + 2, 2 * 66 + 2)


def test_a_run_of_rows_resumes(run, rows, refused, tmp_path):
    flags = ("--from-file", rows(*ROWS))
    outdir = run(*flags)
    before = {path.name: path.read_bytes() for path in (outdir / "samples").iterdir()}
    for name in ("00001.png", "00003.png"):
        (outdir / "samples" / name).unlink()
    run(*flags, "--resume")
    assert {path.name: path.read_bytes() for path in (outdir / "samples").iterdir()} == before
    shutil.copytree(outdir, tmp_path / "refused")
    assert "rows" in refused("--from-file", rows(*ROWS[:1], ROWS[1] | {"seed": 8}, *ROWS[2:]), "--resume")


def test_bad_rows_are_refused_by_file_and_line(refused, rows, tmp_path):
    cases = (
        ({"prompt": "a", "size": [33, 32]}, "width 33 is not a multiple of 8"),
        ({"prompt": "a", "steps": 2000}, "2000"),
        ({"prompt": "a", "scale": -1}, "scale is -1"),
        ({"prompt": "a", "scale": 1, "negative": "b"}, "a negative prompt has no effect"),
        ({"prompt": "a", "colour": "red"}, "'colour' is unknown"),
    )
    for row, message in cases:
        path = rows({"prompt": "fine"}, row)
        said = refused("--from-file", path)
        assert f"--from-file {str(path)!r}, line 2: " in said and message in said, said
    assert not (tmp_path / "refused").exists()
