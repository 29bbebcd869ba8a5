"""scripts/txt2img.py on random weights and tiny pictures: what it writes, what it repeats, what it refuses."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dsdiff.draw_run import DrawRun
from dsdiff.models.registry import EMBEDDED, TOKENIZER
from dsdiff.pipeline import Pipeline
from scripts import txt2img


@pytest.fixture
def run(run_tiny):
    """run(*flags) -> outdir."""
    return lambda *flags, **more: run_tiny(txt2img, "--ddim_steps", 2, *flags, **more)


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def picture(folder, i):
    return np.asarray(Image.open(folder / f"samples/{i:05}.png")).astype(int)


def difference(a, b):
    return np.abs(a - b).max()


def all_bytes(outdir):
    return {path.relative_to(outdir): path.read_bytes() for path in outdir.rglob("*.png")}


def no_model(*args, **kwargs):
    raise AssertionError("the model was built")


# --- what it writes ----------------------------------------------------------------------------------------


def test_writes_pictures_grid_settings_and_log(run, capsys, random_ckpt):
    outdir = run("--n_samples", 2, "--n_iter", 1, "--seed", 7, "--negative_prompt", "blue")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"embedded shapes model ({random_ckpt})"
    assert re.fullmatch(r"2 pictures in \S+ s: \S+ pictures/s, \S+ s/step", out[1])
    assert names(outdir) == ["grid-0000.png", "log.txt", "samples", "settings.yaml"]
    assert names(outdir / "samples") == ["00000.png", "00001.png"]
    assert Image.open(outdir / "samples/00000.png").size == (48, 32)
    assert difference(picture(outdir, 0), picture(outdir, 1)) > 20
    log = (outdir / "log.txt").read_text()
    assert "embedded shapes model" in log and "pictures/s" in log and "--negative_prompt" in log
    settings = yaml.safe_load((outdir / "settings.yaml").read_text())
    assert (settings["prompts"], settings["pictures"]) == (["a red circle"], 2)
    chosen = {"height": 32, "width": 48, "sampler": "ddim", "steps": 2, "scale": 4.0, "eta": 0.0, "precision": "full"}
    assert {name: settings[name] for name in chosen} == chosen
    assert settings["versions"]["torch"] == torch.__version__ and len(settings["ckpt_sha256"]) == 64


def test_each_png_tells_how_it_was_drawn(run):
    outdir = run("--n_samples", 2, "--n_iter", 1, "--seed", 7, "--negative_prompt", "blue", "--prompt", "ein Kreis: ○")
    info = Image.open(outdir / "samples/00001.png").info
    assert info["prompt"] == "ein Kreis: ○" and info["seed"] == "8"
    told = json.loads(info["dsdiff"])
    assert (told["prompt"], told["seed"], told["run_seed"], told["steps"]) == ("ein Kreis: ○", 8, 7, 2)
    first, second, third = info["parameters"].split("\n")
    assert (first, second) == ("ein Kreis: ○", "Negative prompt: blue")
    start = "Steps: 2, Sampler: DDIM, CFG scale: 4, Seed: 8, Size: 48x32, Model hash: "
    assert third == f"{start}{told['ckpt_sha256'][:10]}, Model: model"


def test_a_png_tells_sampler_and_interval_of_guidance(run):
    once = ("--n_samples", 1, "--n_iter", 1, "--ddim_steps", 4)
    outdir = run(*once, "--sampler", "tcd", "--scale", 2, "--guidance_stop", 0.5, outdir="limited")
    info = Image.open(outdir / "samples/00000.png").info
    for told in (json.loads(info["dsdiff"]), yaml.safe_load((outdir / "settings.yaml").read_text())):
        chosen = {"sampler": "tcd", "eta": 0.3, "scale": 2.0, "guidance_start": 0.0, "guidance_stop": 0.5}
        assert {name: told[name] for name in chosen} == chosen
    assert "Steps: 4, Sampler: TCD, CFG scale: 2," in info["parameters"]
    assert info["parameters"].endswith(", Eta: 0.3, Guidance interval: 0 to 0.5")
    outdir = run(*once, "--sampler", "euler_a", outdir="whole")
    info = Image.open(outdir / "samples/00000.png").info["parameters"]
    assert "Sampler: Euler a" in info and "Guidance interval" not in info


def test_a_png_does_not_tell_where_files_lie(run, random_ckpt):
    tokenizer = TOKENIZER
    outdir = run("--n_samples", 1, "--n_iter", 1, "--tokenizer", tokenizer)
    chunks = Image.open(outdir / "samples/00000.png").info
    told = json.loads(chunks["dsdiff"])
    assert [told[name] for name in ("config", "ckpt", "tokenizer")] == ["txt2img.yaml", random_ckpt.name, "tokenizer"]
    assert not any(os.sep in str(chunk) for name, chunk in chunks.items() if name != "dsdiff")
    settings = yaml.safe_load((outdir / "settings.yaml").read_text())
    paths = [str(EMBEDDED), str(random_ckpt), str(tokenizer)]
    assert [settings[name] for name in ("config", "ckpt", "tokenizer")] == paths
    assert not any(str(Path(path).parent) in chunks["dsdiff"] for path in paths)


def test_steps_that_are_more_than_asked_for_are_told(run, monkeypatch, capsys):
    monkeypatch.setattr(DrawRun, "summary", lambda self: f"counted {self.steps}")
    for sampler, taken in (([], 8), (["--plms"], 8), (["--dpm_solver"], 7)):
        outdir = run("--n_samples", 1, "--n_iter", 1, "--ddim_steps", 7, *sampler, outdir=f"out{sampler}")
        out = capsys.readouterr().out.splitlines()
        assert f"counted {taken}" in out, sampler
        assert ("7 steps do not divide the model's 1000: 8 are taken" in out) is (taken == 8), sampler
        for told in (
            yaml.safe_load((outdir / "settings.yaml").read_text()),
            json.loads(Image.open(outdir / "samples/00000.png").info["dsdiff"]),
        ):
            assert (told["steps"], told["steps_taken"]) == (7, taken), sampler


def test_the_png_is_enough_to_draw_the_picture_again(run):
    outdir = run("--n_iter", 1, "--seed", 7, "--ratio", 0.5)
    again = run("--n_iter", 1, "--seed", 9, "--ratio", 0.5, "--n_samples", 1, outdir="again")
    assert difference(picture(outdir, 2), picture(again, 0)) <= 1


def test_a_second_run_goes_on_counting(run):
    outdir = run("--n_samples", 1)
    before = all_bytes(outdir)
    run("--n_samples", 1, "--n_iter", 1, "--seed", 43)
    assert names(outdir / "samples") == ["00000.png", "00001.png", "00002.png"]
    assert names(outdir)[:2] == ["grid-0000.png", "grid-0001.png"]
    after = all_bytes(outdir)
    assert all(after[name] == before[name] for name in before)
    assert difference(picture(outdir, 1), picture(outdir, 2)) <= 1  # seed 42 + 1 and seed 43


def test_skips(run):
    assert names(run("--n_iter", 1, "--n_samples", 1, "--skip_grid")) == ["log.txt", "samples", "settings.yaml"]
    outdir = run("--n_iter", 1, "--n_samples", 1, "--skip_save", outdir="b")
    assert names(outdir) == ["grid-0000.png", "log.txt", "settings.yaml"]


# --- what a picture depends on -----------------------------------------------------------------------------


def test_batch_size_changes_rounding_only(run):
    for flags in ([], ["--ddim_eta", 1], ["--ratio", 0.5, "--merge_mlp"]):
        a = run("--n_samples", 3, "--n_iter", 1, *flags, outdir=f"a{flags}")
        b = run("--n_samples", 1, "--n_iter", 3, *flags, outdir=f"b{flags}")
        assert all(difference(picture(a, i), picture(b, i)) <= 1 for i in range(3)), flags
        assert difference(picture(a, 0), picture(a, 1)) > 20, flags


def test_fixed_code_gives_all_pictures_the_noise_of_the_seed(run):
    outdir = run("--n_samples", 1, "--fixed_code", "--seed", 3)
    assert (picture(outdir, 0) == picture(outdir, 1)).all()
    plain = run("--n_samples", 1, "--n_iter", 1, "--seed", 3, outdir="plain")
    assert (picture(outdir, 0) == picture(plain, 0)).all()
    assert Image.open(outdir / "samples/00001.png").info["seed"] == "3"


REACHING = (
    ["--prompt", "two black stars"],
    ["--negative_prompt", "blue"],
    ["--scale", 1],
    ["--plms"],
    ["--dpm_solver"],
    ["--ddim_eta", 1],
    ["--ddim_steps", 3],
    ["--seed", 43],
    ["--ratio", 0.75],
    ["--precision", "autocast"],
)


def test_flags_reach_the_picture(run):
    one = ["--n_samples", 1, "--n_iter", 1]
    plain = picture(run(*one), 0)
    for flags in REACHING:
        assert (plain != picture(run(*one, *flags, outdir=f"b{flags[0]}"), 0)).any(), flags


def test_prompts_of_a_file_in_order_once_per_round(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  a blue star\n\na green ring".encode())
    outdir = run("--from-file", file, "--n_samples", 2, "--n_iter", 2, "--skip_grid")
    prompts = [Image.open(outdir / f"samples/{i:05}.png").info["prompt"] for i in range(6)]
    assert prompts == ["a red circle", "a blue star", "a green ring"] * 2
    alone = run("--prompt", "a blue star", "--seed", 43, "--n_samples", 1, "--n_iter", 1, outdir="alone")
    assert difference(picture(outdir, 1), picture(alone, 0)) <= 1


# --- resuming ----------------------------------------------------------------------------------------------

LONG = ["--n_samples", 2, "--n_iter", 2, "--ratio", 0.5, "--ddim_eta", 0.5]


def interrupt_batch(monkeypatch, number):
    """Ctrl-C in the first step of that batch."""
    calls, draw = [], Pipeline.sample

    def sample(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(Pipeline, "sample", sample)


def test_resume_ends_with_the_pictures_of_an_uninterrupted_run(run, monkeypatch, capsys):
    whole = run(*LONG, outdir="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        interrupt_batch(patch, 2)
        run(*LONG)
    assert exit.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted: 2 pictures drawn") and "--resume" in last
    outdir = run(*LONG, "--resume")
    assert "2 pictures in" in capsys.readouterr().out
    assert all_bytes(outdir) == all_bytes(whole)


def test_resume_draws_what_is_missing_or_damaged(run, capsys):
    outdir = run(*LONG)
    run("--n_samples", 1, "--n_iter", 1, "--seed", 1)  # a later run; its settings are the ones to resume
    before = all_bytes(outdir)
    shutil.copy(outdir / "samples/00000.png", outdir / "samples/00004.png")
    os.truncate(outdir / "samples/00004.png", 300)
    capsys.readouterr()
    run("--n_samples", 1, "--n_iter", 1, "--seed", 1, "--resume")
    assert "1 pictures in" in capsys.readouterr().out
    assert all_bytes(outdir) == before


def test_resume_of_a_complete_run_needs_no_model(run, monkeypatch, capsys):
    outdir = run(*LONG)
    before = all_bytes(outdir)
    monkeypatch.setattr(Pipeline, "prepare", no_model)
    run(*LONG, "--resume")
    assert "nothing left to draw" in capsys.readouterr().out
    assert all_bytes(outdir) == before


def test_resume_reads_any_prompt_as_it_was(run, capsys):
    flags = ["--n_samples", 1, "--n_iter", 1, "--prompt", "a red\u0085circle\u2028 \N{UNICORN FACE}"]
    run(*flags)
    run(*flags, "--resume")
    assert "nothing left to draw" in capsys.readouterr().out


def test_resume_of_nothing_begins(run):
    outdir = run("--n_samples", 1, "--n_iter", 1, "--resume")
    assert names(outdir / "samples") == ["00000.png"]


def test_resume_refuses_other_settings(run, refused, monkeypatch):
    outdir = run("--n_samples", 1, "--n_iter", 1)
    monkeypatch.setattr(Pipeline, "prepare", no_model)
    flags = ["--resume", "--n_samples", 1, "--n_iter", 1]
    assert "scale (4.0 there, 5.0 here)" in refused(*flags, "--scale", 5, outdir="out")
    assert "prompts" in refused(*flags, "--prompt", "a ring", outdir="out")
    assert "merge" in refused(*flags, "--ratio", 0.5, outdir="out")
    (outdir / "settings.yaml").write_text("[1")
    assert "settings.yaml' cannot be read" in refused(*flags, outdir="out")
    (outdir / "settings.yaml").unlink()
    assert "no settings.yaml" in refused(*flags, outdir="out")


def test_resume_of_an_older_run_that_merged_tokens(run, refused, capsys):
    """It knew fewer options of merging, and did as the defaults of the others."""
    outdir = run(*LONG, "--ratio", 0.5)
    before, path = all_bytes(outdir), outdir / "settings.yaml"
    settings = yaml.safe_load(path.read_text())
    for name in ("proportional", "merge_kv", "merge_schedule", "merge_levels", "merge_every", "merge_share"):
        del settings["merge"][name]
    path.write_text(yaml.safe_dump(settings))
    (outdir / "samples/00003.png").unlink()
    said = refused(*LONG, "--ratio", 0.5, "--proportional", "--resume", outdir=outdir)
    assert "merge.proportional (False there, True here)" in said
    run(*LONG, "--ratio", 0.5, "--resume")
    assert all_bytes(outdir) == before


def test_resume_of_an_older_run_goes_by_what_its_version_did(run, refused, capsys):
    outdir = run(*LONG)
    before, path = all_bytes(outdir), outdir / "settings.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["vae"], settings["vae_tiling"]  # older versions decoded in float32, and wrote neither
    path.write_text(yaml.safe_dump(settings))
    (outdir / "samples/00003.png").unlink()
    for flags, said in ((["--vae", "bf16"], "vae (float32 there, bf16 here)"), (["--vae_tiling"], "vae_tiling (False")):
        assert said in refused(*LONG, "--resume", *flags, outdir="out")
    capsys.readouterr()
    run(*LONG, "--resume")  # the whole batch of the missing one
    assert "2 pictures in" in capsys.readouterr().out
    assert all_bytes(outdir) == before


# --- what it refuses ---------------------------------------------------------------------------------------


BAD_FLAGS = (
    (["--H", 100], "height 100 is not a multiple of 8: use 96 or 104"),
    (["--W", 3], "width 3 is not a multiple of 8: use 8"),
    (["--C", 3], "--C 3 contradicts the model, which has 4"),
    (["--f", 4], "--f 4 contradicts the model, which has 8"),
    (["--ddim_steps", 0], "--ddim_steps: must be a whole number of 1 or more, got '0'"),
    (["--ddim_steps", 1001], "1..1000, got 1001"),
    (["--ddim_eta", 2], "in 0..1"),
    (["--scale", "nan"], "--scale: must be a number"),
    (["--scale", "inf"], "--scale: must be a number"),
    (["--seed", -1], "--seed"),
    (["--n_samples", 0], "--n_samples"),
    (["--n_iter", "x"], "--n_iter"),
    (["--sed", 1], "unrecognized arguments: --sed 1"),
    (["--precision", "half"], "--precision"),
    (["--plms", "--dpm_solver"], "not allowed with"),
    (["--plms", "--ddim_eta", 0.5], "--ddim_eta 0.5 has no effect with --plms"),
    (["--dpm_solver", "--ddim_eta", 0], "--ddim_eta 0 has no effect with --dpm_solver"),
    (["--sampler", "plms", "--dpm_solver"], "argument --dpm_solver: not allowed with argument --sampler"),
    (["--plms", "--sampler", "plms"], "argument --sampler: not allowed with argument --plms"),
    (["--sampler", "heun"], "argument --sampler: invalid choice: 'heun'"),
    (["--sampler", "euler", "--ddim_eta", 0], "--ddim_eta 0 has no effect with --sampler euler"),
    (["--sampler", "lcm", "--ddim_steps", 51], "1..50, got 51"),
    (["--sampler", "lcm", "--negative_prompt", "x"], "no effect with lcm, which draws without guidance"),
    (["--guidance_start", 0.5, "--scale", 1], "--guidance_start has no effect with --scale 1"),
    (["--guidance_start", 0.5, "--guidance_stop", 0.25], "guidance_start is 0.5 and guidance_stop 0.25"),
    (["--guidance_stop", 1.1], "in 0..1"),
    (["--negative_prompt", "x", "--scale", 1], "--negative_prompt has no effect with --scale 1"),
    (["--prompt", "x", "--from-file", "y"], "either --prompt TEXT or --from-file FILE"),
    (["--skip_grid", "--n_rows", 2], "--n_rows has no effect with --skip_grid"),
    (["--skip_grid", "--skip_save"], "leaves nothing to write"),
    (["--skip_save", "--resume"], "--resume"),
    (["--ratio", 0.8], "ratio is 0.8: with tiles of 2 x 2 it must lie in [0, 0.75]"),
    (["--ratio", 0.5, "--no-merge_attn"], "nothing to merge"),
    (["--merge_mlp", "--sx", 4], "--sx, --merge_mlp has no effect: add --ratio"),
    (["--max_downsample", 3, "--ratio", 0.5], "--max_downsample"),
    (["--proportional", "--merge_every", 2], "--proportional, --merge_every has no effect: add --ratio"),
    (["--merge_schedule", "0:0.8"], "a ratio of merge_schedule is 0.8"),
    (["--merge_schedule", "half"], "merge_schedule is 'half': write PLACE:RATIO"),
    (["--ratio", 0.5, "--merge_schedule", "linear:0.5:0.3"], "so --ratio 0.5 has no effect"),
    (["--ratio", 0.5, "--merge_levels", "3:0.5"], "merge_levels is '3:0.5'"),
    (["--ratio", 0.5, "--merge_every", 0], "--merge_every"),
    (["--from-file", "missing.txt"], "No such file or directory: 'missing.txt'"),
    (["--device", "mps"], "device 'mps' is not supported"),
    (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    (["--tokenizer", "missing"], "no tokenizer in 'missing'"),
    (["--ckpt", "missing.ckpt"], "no checkpoint at 'missing.ckpt'"),
    (["--ckpt", "."], "is not a file"),
    (["--config", "missing.yaml"], "no config at 'missing.yaml'"),
    (["--prompt", "\udcff"], "use UTF-8"),
)


def test_bad_flags(refused):
    for flags, says in BAD_FLAGS:
        assert says in refused(*flags), flags


def test_bad_prompt_file(refused, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n  \n")
    assert "holds no prompts" in refused("--from-file", file)
    file.write_bytes(b"a red circle\n\xff\xfe")
    assert "no UTF-8 text" in refused("--from-file", file)


def test_bad_config(refused, tmp_path):
    file = tmp_path / "config.yaml"
    for text, says in [
        ("model: [1", "is no valid yaml"),
        ("model: {target: torch.nn.Identity}", "describes no latent diffusion model"),
        ("- 1", "holds a list: it must hold settings by name"),
        (EMBEDDED.read_text() + "\n  stpes: 3\n", "sampling may hold description, height"),
        (EMBEDDED.read_text().replace("\n  steps: 50", "\n  steps: x"), "sampling.steps cannot be 'x'"),
    ]:
        file.write_text(text)
        assert says in refused("--config", file)


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


def test_bad_checkpoint(refused, tmp_path, random_ckpt):
    good = random_ckpt.read_bytes()
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "truncated.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 1000)
    for name, says in {
        "other.ckpt": "does not fit the config",
        "hostile.ckpt": "wants to run code",
        "pickle.ckpt": "corrupt, truncated, or no torch zip file",
        "empty.ckpt": "is empty",
        "truncated.safetensors": "corrupt or truncated",
        "garbage.safetensors": "corrupt or truncated",
    }.items():
        assert says in refused("--ckpt", tmp_path / name)


def test_unwritable_outdir_is_told_before_the_model_loads(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(Pipeline, "prepare", no_model)
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(outdir="file")
    assert "is not a directory" in refused(outdir="file/out")
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere but here
        assert "cannot write to '/proc/out'" in refused(outdir="/proc/out")
    else:
        assert "cannot write to" in refused(outdir="closed/out")


def test_verbose_shows_where_an_error_comes_from(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--ckpt", "missing.ckpt", "--verbose")
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: no checkpoint at 'missing.ckpt'")


def test_verbose_begins_with_the_model_too(run, capsys, random_ckpt):
    outdir = run("--n_samples", 1, "--n_iter", 1, "--verbose")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"embedded shapes model ({random_ckpt})" and out[1].startswith("arguments: [")
    assert "arguments: [" in (outdir / "log.txt").read_text()


def test_defects_are_not_disguised(run, monkeypatch, tmp_path):
    for defect in (TypeError("x"), RuntimeError("x"), AssertionError("x")):

        def fail(*args, defect=defect):
            raise defect

        monkeypatch.setattr(Pipeline, "prepare", fail)
        with pytest.raises(type(defect)):
            run()


def test_out_of_memory_is_told(refused, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(Pipeline, "prepare", fail)
    assert "out of memory: use smaller batches" in refused()


# --- where it runs ---------------------------------------------------------------------------------------


def test_runs_anywhere(run, monkeypatch, tmp_path, random_ckpt):
    monkeypatch.chdir(tmp_path)
    one = ["--n_samples", 1, "--n_iter", 1]
    a = run(*one, "--config", os.path.relpath(EMBEDDED), "--ckpt", os.path.relpath(random_ckpt), outdir="a")
    b = run(*one, "--tokenizer", TOKENIZER, outdir="b")
    assert (picture(a, 0) == picture(b, 0)).all()


def test_as_a_program_from_another_folder(tmp_path):
    def program(*flags):
        command = [sys.executable, Path(txt2img.__file__), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    shown = program("--help")
    assert shown.returncode == 0 and "--max_downsample" in shown.stdout and not shown.stderr
    failed = program("--prompt", "x", "--ckpt", "pyproject.toml")
    assert failed.returncode == 2
    assert failed.stderr == "error: no checkpoint at 'pyproject.toml': give its path with --ckpt\n"
    assert not list(tmp_path.iterdir())


def test_the_embedded_model(tmp_path, capsys):
    """The shipped weights. How well they draw is measured in test_eval_attributes."""
    flags = ["--prompt", "a red circle on a white background", "--n_samples", "2", "--n_iter", "1", "--device", "cpu"]
    txt2img.main([*flags, "--config", str(EMBEDDED), "--ddim_steps", "10", "--outdir", str(tmp_path)])
    assert capsys.readouterr().out.startswith("embedded shapes model (")
    assert names(tmp_path / "samples") == ["00000.png", "00001.png"]
    first, second = picture(tmp_path, 0), picture(tmp_path, 1)
    assert first.shape == second.shape == (256, 256, 3)
    assert first.std(axis=(0, 1)).max() > 10 and second.std(axis=(0, 1)).max() > 10
    assert difference(first, second) > 20
