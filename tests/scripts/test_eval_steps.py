"""scripts/eval_steps.py: a table for each number of steps, and what is refused."""

import json

import pytest

from scripts import eval_steps as script


def test_tables_are_written_and_figures_kept(small_model, tmp_path, capsys):
    config, ckpt = small_model
    settings, prompts, out = tmp_path / "settings.yaml", tmp_path / "prompts.txt", tmp_path / "out"
    settings.write_text("settings:\n- {name: cached, cache: 2}\n- {name: guided, guidance_stop: 0.5}\n")
    prompts.write_text("a red circle\na blue star\n")
    model = ["--config", config, "--ckpt", ckpt, "--device", "cpu", "--precision", "full", "--dpm_solver"]
    what = ["--steps", 4, 2, "--settings", settings, "--prompts", prompts, "--n", 2, "--parts", "eps", "--outdir", out]
    script.main([str(each) for each in (*model, *what)])
    four, two = json.loads((out / "steps.json").read_text())["comparisons"]
    assert (four["steps"], two["steps"]) == (4, 2) and four["rows"][0]["changes"] == {"cache": 2}
    assert [error > 0 for error in four["rows"][0]["eps"]["by_call"]] == [False, True, False, True]
    assert (out / "steps.md").read_text().strip() in capsys.readouterr().out
    assert not (out / "steps.png").exists()  # nothing was timed
    # Times of another run stand beside these figures, which need not be of this machine.
    what = ["--settings", settings, "--prompts", prompts, "--parts", "time", "--repeats", 1]
    timed = [*model, *what, "--quality", out / "steps.json"]
    script.main([str(each) for each in (*timed, "--steps", 4, "--outdir", tmp_path / "timed")])
    (both,) = json.loads((tmp_path / "timed/steps.json").read_text())["comparisons"]
    assert [row["eps"] for row in both["rows"]] == [row["eps"] for row in four["rows"]]
    assert all(row["time"]["own"] for row in both["rows"]) and both["quality_of"] == four["machine"]
    assert both["n"] == 2 and (tmp_path / "timed/steps.png").exists() and " Quality: " in capsys.readouterr().out
    with pytest.raises(SystemExit):  # another model's
        script.main([str(each) for each in (*timed[4:], "--dpm_solver", "--steps", 4, "--outdir", tmp_path / "timed")])
    assert "no figures of embedded shapes model (model.safetensors)" in capsys.readouterr().err
    settings.write_text(settings.read_text().replace("cache: 2", "cache: 3"))  # another way of the same name
    script.main([str(each) for each in (*timed, "--steps", 4, "--outdir", tmp_path / "timed")])
    (both,) = json.loads((tmp_path / "timed/steps.json").read_text())["comparisons"]
    assert [row["eps"] is None for row in both["rows"]] == [True, False]


def test_bad_flags_are_one_line(capsys, tmp_path):
    other = tmp_path / "steps.json"
    other.write_text(
        '{"comparisons": [{"model": "x", "drawing": {"steps": 3}, "n": 2, "seed": 0, "machine": {}, "rows": []}]}'
    )
    for flags, says in (
        (["--steps", "0"], "--steps"),
        (["--ddim_steps", "4"], "--steps says how many"),
        (["--cache", "2"], "--cache"),
        (["--time_engine", "int8"], "--time_engine has no effect"),
        (["--names", "nothing"], "have no 'nothing'"),
        (["--quality", str(other)], "give --parts time"),
        (["--parts", "time", "--quality", str(other)], "no figures of embedded shapes model (model.safetensors) drawn"),
        (["--parts", "time", "--quality", __file__], "no JSON file of this command"),
        (["--parts", "time", "--quality", "nowhere.json"], "nowhere.json"),
    ):
        with pytest.raises(SystemExit) as leaving:
            script.main([*flags, "--outdir", str(tmp_path / "out")])
        assert leaving.value.code == 2, flags
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and says in error, (flags, error)
    assert not (tmp_path / "out").exists()
