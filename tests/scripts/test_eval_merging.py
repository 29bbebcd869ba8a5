"""scripts/eval_merging.py: the files it writes, and what it refuses."""

import json

import pytest

from dsdiff.cli import frontier
from scripts import eval_merging as script


def test_a_table_is_written(small_model, tmp_path, capsys):
    config, ckpt = small_model
    settings, prompts = tmp_path / "settings.yaml", tmp_path / "prompts.txt"
    settings.write_text("settings:\n- {name: half, ratio: 0.5}\n- {name: most, ratio: 0.75, merge_kv: true}\n")
    prompts.write_text("a red circle\na blue star\n")
    out = tmp_path / "out"
    model = ["--config", config, "--ckpt", ckpt, "--device", "cpu", "--precision", "full", "--ddim_steps", 2]
    what = [
        "--settings",
        settings,
        "--prompts",
        prompts,
        "--n",
        2,
        "--parts",
        "eps",
        "--names",
        "most",
        "--outdir",
        out,
    ]
    script.main([str(each) for each in (*model, *what)])
    content = json.loads((out / "merging.json").read_text())["comparisons"][0]
    (row,) = content["rows"]
    assert (row["name"], row["changes"]["merge"]["merge_kv"], row["pictures"], row["time"]) == (
        "most",
        True,
        None,
        None,
    )
    assert row["eps"]["mse"] > 0 and len(row["eps"]["by_call"]) == 2 and content["n"] == 2
    table = (out / "merging.md").read_text()
    assert table.strip() in capsys.readouterr().out and "most" in table


def test_flags_become_options():
    args = script.parse_args(["--time_of", "sd-v1", "--time_engine", "int8", "--ptq", "--dpm_solver", "--calls", "4"])
    options = frontier.options_of(args)
    assert (options.time_of, options.engine, options.calls, options.parts) == (
        "sd-v1",
        "int8",
        4,
        ["eps", "pictures", "time"],
    )
    assert options.quantization is not None and options.draw.sampler == "dpm_solver" and options.draw.merge is None


def test_bad_flags_are_one_line(capsys, tmp_path):
    for flags, says in (
        (["--n", "1"], "--n"),
        (["--parts", "speed"], "--parts"),
        (["--ratio", "0.5"], "--ratio"),
        (["--time_engine", "int8"], "--time_engine has no effect with --time_of model"),
        (["--engine", "int8"], "without --ptq nothing is quantized"),
        (["--names", "nothing"], "have no 'nothing'"),
        (["--settings", "missing.yaml"], "missing.yaml"),
    ):
        with pytest.raises(SystemExit) as leaving:
            script.main([*flags, "--outdir", str(tmp_path / "out")])
        assert leaving.value.code == 2, flags
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and says in error, flags
    assert not (tmp_path / "out").exists()
