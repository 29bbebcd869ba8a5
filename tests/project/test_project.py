"""The files around the code: versions, commands, sizes."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "models" / "ldm" / "shapes"


def pins(lines) -> dict[str, str]:
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_requirements_and_conda_environment_agree():
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == "dsdiff"
    assert pins(pip) == requirements and len(requirements) > 10


def test_everything_imported_is_required_and_everything_required_is_used():
    names = {"pytorch-lightning": "pytorch_lightning", "pillow": "PIL"}
    sources = "\n".join(
        path.read_text() for folder in ("ldm", "tomesd", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    for package in pins((ROOT / "requirements.txt").read_text().splitlines()):
        module = names.get(package, package)
        if package != "ruff":  # run by `make lint`
            assert re.search(rf"(import|from|importorskip\(\")\s*{module}\b", sources), package


def test_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["ldm*", "qdiff*", "tomesd*"]


def test_ci_runs_the_readme_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_links_exist():
    readme = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("target", ["demo", "test", "lint", "train"])
def test_make_targets_exist(target):
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_embedded_model_is_small():
    weights = list(EMBEDDED.glob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 24e6
