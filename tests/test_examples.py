"""The examples run, and are short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_examples_run(tmp_path):
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert {"draw", "compare_bits", "merge_tokens_diffusers", "calibrate_your_model"} <= {s.stem for s in scripts}
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40, script
        target = tmp_path / script.stem / ("bits.png" if script.stem == "compare_bits" else "")
        command = [sys.executable, str(script), str(target)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, (script, result.stderr[-500:])
        assert result.stdout.strip(), script
    assert (tmp_path / "draw" / "1.png").is_file() and (tmp_path / "compare_bits" / "bits.png").is_file()
