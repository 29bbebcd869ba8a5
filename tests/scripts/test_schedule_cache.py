"""scripts/schedule_cache.py: the file it writes, drawing with it, and what it refuses."""

import json

import pytest
import yaml

from scripts import schedule_cache as script
from scripts import txt2img


def test_a_schedule_is_written_and_drawn_with(small_model, tmp_path, capsys):
    config, ckpt = small_model
    prompts, file, out = tmp_path / "prompts.txt", tmp_path / "cache.json", tmp_path / "out"
    prompts.write_text("a red circle\n")
    model = ["--config", config, "--ckpt", ckpt, "--device", "cpu", "--precision", "full", "--H", 32, "--W", 32]
    drawing = [*model, "--sampler", "euler", "--ddim_steps", 4]
    what = ["--whole", 2, "--n", 1, "--prompts", prompts]
    script.main([str(each) for each in (file, *drawing, *what)])
    content = json.loads(file.read_text())
    assert (content["sampler"], content["steps"], content["guidance"], content["depth"]) == ("euler", 4, [0, 1], 1)
    assert len(content["whole"]) == 2 and content["made"]["prompts"] == 1
    assert "**2 of 4**" in capsys.readouterr().out
    draw = [*drawing, "--prompt", "a ring", "--n_iter", 1, "--n_samples", 1, "--outdir", out, "--cache", file]
    txt2img.main([str(each) for each in draw])
    record = yaml.safe_load((out / "settings.yaml").read_text())
    assert (record["cache"], record["cache_depth"]) == (content["whole"], 1)
    txt2img.main([str(each) for each in (*draw, "--resume")])  # the record is that of the same settings
    draw[draw.index(4)] = 5
    with pytest.raises(SystemExit):
        txt2img.main([str(each) for each in draw])
    assert "was made for steps 4, and this is 5" in capsys.readouterr().err


def test_bad_flags_are_one_line(capsys, tmp_path):
    file = str(tmp_path / "cache.json")
    for flags, says in (
        ([file], "--error"),
        ([file, "--whole", "2", "--error", "1"], "not allowed"),
        ([file, "--whole", "0"], "--whole"),
        ([file, "--whole", "9", "--dpm_solver", "--ddim_steps", "8"], "--whole is 9: there are 8 steps"),
        ([file, "--whole", "2", "--cache", "2"], "--cache"),
        ([file, "--whole", "2", "--longest", "1"], "--longest"),
        ([file, "--whole", "2", "--cache_depth", "99"], "cache_depth is 99"),
        ([file, "--whole", "2", "--prompts", "none.txt"], "none.txt"),
    ):
        with pytest.raises(SystemExit) as leaving:
            script.main(flags)
        assert leaving.value.code == 2, flags
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and says in error, (flags, error)
    assert not list(tmp_path.iterdir())
