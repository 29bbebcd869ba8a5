"""The rules of who imports whom, read off the sources."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ldm", "tomesd", "qdiff", "dsdiff", "scripts")
# What each package may import of the others. qdiff sees ldm's block types and nothing of the rest.
ALLOWED = {
    "ldm": ("ldm",),
    "tomesd": ("tomesd",),
    "qdiff": ("qdiff", "ldm.fileio", "ldm.modules.attention", "ldm.modules.diffusionmodules.openaimodel"),
    "dsdiff": PACKAGES,
    "scripts": PACKAGES,
}
# What makes quantized models. The engine runs them, and must do without.
CALIBRATION = ("qdiff.calibration_set", "qdiff.reconstruction", "qdiff.adaptive_rounding")


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def out_of_layer(package: str, names: set[str]) -> set[str]:
    """Those of the imported `names` that a source of `package` may not import."""
    ours = {name for name in names if within(name, PACKAGES) and not within(name, ALLOWED[package])}
    # `from a.b import c` is listed as a.b and as a.b.c: one of them within the allowed ones is enough.
    return {name for name in ours if not any(within(allowed, (name,)) for allowed in ALLOWED[package])}


def calibration_in(names: set[str]) -> set[str]:
    """Those of the imported `names` that the engine may not import."""
    return {name for name in names if within(name, CALIBRATION)}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_layer(path, imports_of):
    package = path.relative_to(ROOT).parts[0]
    assert not out_of_layer(package, imports_of(path))


def test_the_engine_imports_no_calibration(imports_of):
    for path in (ROOT / "qdiff" / "engine").rglob("*.py"):
        assert not calibration_in(imports_of(path)), path


@pytest.mark.parametrize(
    "package, source, found",
    [
        ("ldm", "import tomesd", {"tomesd"}),
        ("ldm", "import ldmx, torch\nfrom ldm.util import default", set()),
        ("tomesd", "def f():\n    from ldm.util import default", {"ldm.util", "ldm.util.default"}),
        ("tomesd", "from . import merge", set()),
        ("qdiff", "from ldm.modules.attention import CrossAttention\nimport qdiff.quant_layer", set()),
        ("qdiff", "from ldm.modules import attention", set()),
        ("qdiff", "from ldm.modules.ema import LitEma", {"ldm.modules.ema", "ldm.modules.ema.LitEma"}),
        ("qdiff", "import dsdiff.pipeline", {"dsdiff.pipeline"}),
        ("scripts", "import ldm.util, tomesd, qdiff\nfrom dsdiff.pipeline import ROOT", set()),
    ],
)
def test_the_layers_are_told_apart(tmp_path, imports_of, package, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert out_of_layer(package, imports_of(path)) == found


@pytest.mark.parametrize(
    "source, found",
    [
        ("import qdiff.calibration_set", {"qdiff.calibration_set"}),
        ("from qdiff import reconstruction", {"qdiff.reconstruction"}),
        (
            "from qdiff.adaptive_rounding import Rounding",
            {"qdiff.adaptive_rounding", "qdiff.adaptive_rounding.Rounding"},
        ),
        ("import qdiff.quant_layer, qdiff.calibration_free\nfrom qdiff import engine", set()),
    ],
)
def test_calibration_in_the_engine_would_be_noticed(tmp_path, imports_of, source, found):
    path = tmp_path / "engine.py"
    path.write_text(source)
    assert calibration_in(imports_of(path)) == found
