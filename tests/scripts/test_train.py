"""The command that trains: its flags, its lines, its exit status. Training itself: tests/dsdiff/training."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scripts import train

DATASET = {"target": "ldm.data.reader.ReaderDataset", "params": {"size": 8, "resolution": 64}}
READER = {"target": "ldm.data.reader.ShapesReader", "params": {"width": 8, "features": 8}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """reader.yaml, the config of a small reader, in the present folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    content = {
        "model": READER | {"base_learning_rate": 4e-3},
        "data": {"batch_size": 4, "train": DATASET, "validation": DATASET},
        "trainer": {"max_steps": 2, "checkpoint_every": 2, "export": "reader.safetensors"},
    }
    OmegaConf.save(content, "reader.yaml")
    return tmp_path


def test_a_run_and_what_it_prints(config, capsys):
    train.main(["--config", "reader.yaml", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == "wrote reader.safetensors"
    train.main(["--config", "reader.yaml", "--device", "cpu", "--export_only", "--export", "later.safetensors"])
    assert capsys.readouterr().out.splitlines()[-1] == "wrote later.safetensors"
    first, later = load_file("reader.safetensors"), load_file("later.safetensors")
    assert first.keys() == later.keys() and all((first[name] == later[name]).all() for name in first)
    train.main(["--config", "reader.yaml", "--device", "cpu", "--outdir", "other", "--max_steps", "1", "--export", ""])
    assert "wrote" not in capsys.readouterr().out and Path("other/checkpoints/last.ckpt").exists()


def test_bad_input_is_one_line(config, capsys):
    Path("broken.yaml").write_text("model: [")
    Path("partial.yaml").write_text("model: {}")
    content = OmegaConf.load("reader.yaml")
    content.trainer.init_from = {"trunk.": "missing.safetensors"}
    OmegaConf.save(content, "second.yaml")
    for arguments, message in (
        (["missing.yaml"], "missing.yaml"),
        (["broken.yaml"], "broken.yaml"),
        (["partial.yaml"], "no data, trainer"),
        (["second.yaml", "--device", "cpu"], "missing.safetensors"),
        (["reader.yaml", "--device", "tpu"], "tpu"),
        (["reader.yaml", "--max_steps", "0"], "max_steps"),
        (["reader.yaml", "--export", "weights.ckpt"], ".safetensors"),
        (["reader.yaml", "--export_only"], "train first"),
        (["reader.yaml", "--export_only", "--export", ""], "--export FILE"),
        (["reader.yaml", "--device", "cpu", "--devices", "3"], "batches of 4"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("error:") == 1, arguments
        assert "Traceback" not in error and not (config / "runs").exists(), arguments


def test_help_imports_no_torch():
    code = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path({train.__file__!r}, run_name='__main__')"
    lines = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert "--config" in done.stdout and done.stdout.splitlines()[-1] == "False"
