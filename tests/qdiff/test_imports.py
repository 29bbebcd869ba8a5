"""What an import of qdiff loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import qdiff

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = (
    "adaptive_rounding",
    "calibrate",
    "calibration_set",
    "capture",
    "observers",
    "optimization",
    "recomputation",
    "reconstruction",
    "resume",
)


def loaded_by(statement):
    """The modules that a fresh Python has loaded after `statement`."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_settings_need_no_torch():
    assert "torch" not in loaded_by("import qdiff, qdiff.config\nqdiff.QuantConfig()")


def test_running_needs_no_calibration():
    loaded = loaded_by("import qdiff.engine.lower, qdiff.quant_state")
    assert "qdiff.quant_model" in loaded
    assert not {f"qdiff.{name}" for name in CALIBRATION} & loaded
    assert "qdiff.reconstruction" in loaded_by("from qdiff import block_reconstruction")  # it would be seen


def test_all_public_names_are_there():
    assert set(qdiff.__all__) == {
        "AdaRoundQuantizer",
        "BaseQuantBlock",
        "QuantConfig",
        "QuantModel",
        "QuantModule",
        "ReconConfig",
        "UniformAffineQuantizer",
        "block_reconstruction",
        "layer_reconstruction",
        "load_cali_ckpt",
        "save_cali_ckpt",
    }
    assert set(qdiff.__all__) <= set(dir(qdiff))
    for name in qdiff.__all__:
        assert getattr(qdiff, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qdiff.nothing  # noqa: B018
