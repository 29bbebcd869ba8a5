"""The rules of who imports whom, read off the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ldm", "tomesd", "qdiff", "scripts")
# What each package may import of the others. qdiff sees ldm's block types and nothing of the rest.
ALLOWED = {
    "ldm": ("ldm",),
    "tomesd": ("tomesd",),
    "qdiff": ("qdiff", "ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"),
    "scripts": PACKAGES,
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_layer(path):
    package = path.relative_to(ROOT).parts[0]
    # `from a.b import c` is listed as a.b and as a.b.c: one of them within the allowed ones is enough.
    for name in imports_of(path):
        if within(name, PACKAGES) and not within(name, ALLOWED[package]):
            parents = [allowed for allowed in ALLOWED[package] if within(allowed, (name,))]
            assert parents, f"{path.name} imports {name}"


def test_the_engine_imports_no_calibration():
    for path in (ROOT / "qdiff" / "engine").rglob("*.py"):
        forbidden = ("qdiff.calibration", "qdiff.reconstruction", "qdiff.adaptive_rounding")
        assert not any(within(name, forbidden) for name in imports_of(path)), path


def test_the_rules_would_notice(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("import qdiff.quant_layer\nfrom ldm.util import default\n")
    assert {"qdiff.quant_layer", "ldm.util", "ldm.util.default"} == imports_of(source)
    assert not within("ldm.util", ALLOWED["qdiff"]) and not within("ldmx", ("ldm",))
