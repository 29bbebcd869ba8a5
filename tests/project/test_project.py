"""The files around the code: versions, commands, sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "models" / "ldm" / "shapes"
OURS = ("ldm", "tomesd", "qdiff", "dsdiff", "scripts", "tests")
PACKAGE_NAMES = {  # module -> package, where the two differ
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "pytorch_lightning": "pytorch-lightning",
    "torch_fidelity": "torch-fidelity",
    "yaml": "pyyaml",
}


def pins(lines) -> dict[str, str]:
    """Package -> version, extras such as [nodejs] left out of the name."""
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.split("[")[0]: version for name, version in pairs}


def test_requirements_and_conda_environment_agree():
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == "dsdiff"
    assert pins(pip) == requirements and len(requirements) > 10


def loaded_by_name(path: Path) -> set[str]:
    """What a test asks for by a string: importorskip("x"), distribution("x")."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {
        call.args[0].value.split(".")[0]
        for call in calls
        if getattr(call.func, "attr", None) in ("importorskip", "distribution")
        and isinstance(call.args[0], ast.Constant)
    }


def test_everything_imported_is_required_and_everything_required_is_used(imports_of):
    paths = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    imported = {name.split(".")[0] for path in paths for name in imports_of(path)} - {*OURS, *sys.stdlib_module_names}
    by_tests = set().union(*(loaded_by_name(path) for path in (ROOT / "tests").rglob("*.py")))
    used = {PACKAGE_NAMES.get(module, module) for module in imported | by_tests} | {"ruff", "pyright"}  # run by `make lint`
    required = pins((ROOT / "requirements.txt").read_text().splitlines()).keys()
    assert used - required == set(), "imported, not required"
    assert required - used == set(), "required, not used"


def test_what_is_loaded_by_name_is_found(tmp_path):
    source = tmp_path / "test_source.py"
    source.write_text(
        """a = pytest.importorskip("one.part")\nb = metadata.distribution('two')\nc = d.other("three")\n"""
    )
    assert loaded_by_name(source) == {"one", "two"}


def test_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["dsdiff*", "ldm*", "qdiff*", "tomesd*"]


def test_ci_runs_the_readme_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_links_exist():
    readme = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("target", ["demo", "test", "lint", "train", "bench"])
def test_make_targets_exist(target):
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_embedded_model_is_there_and_small():
    assert (EMBEDDED / "model.safetensors").is_file() and (EMBEDDED / "reader.safetensors").is_file()
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    quantized = [path for path in files if path.name.startswith("cali_")]
    assert sum(path.stat().st_size for path in files if path not in quantized) <= 24e6
    assert sum(path.stat().st_size for path in quantized) <= 12e6


def test_embedded_model_has_the_autoencoder_that_was_trained():
    alone, whole = (
        yaml.safe_load((ROOT / "configs" / "shapes" / name).read_text())["model"]["params"]
        for name in ("autoencoder.yaml", "txt2img.yaml")
    )
    inside = whole["first_stage_config"]["params"]
    assert alone["ddconfig"]["z_channels"] == whole["channels"]
    assert (inside["ddconfig"], inside["embed_dim"]) == (alone["ddconfig"], alone["embed_dim"])
