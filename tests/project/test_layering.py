"""The rules of the house, read off the sources: who imports whom, and what has one home in the tree."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ldm", "tomesd", "qdiff", "dsdiff", "scripts")
BLOCKS = ("attention", "diffusionmodules", "low_rank")
# What each package may import of the others. qdiff sees ldm's block types and nothing of the rest.
ALLOWED = {
    "ldm": ("ldm",),
    "tomesd": ("tomesd",),
    "qdiff": ("qdiff", "ldm.fileio", "ldm.tensor_files", *(f"ldm.modules.{name}" for name in BLOCKS)),
    "dsdiff": ("ldm", "tomesd", "qdiff", "dsdiff"),
    "scripts": ("ldm", "tomesd", "qdiff", "dsdiff"),
}
# What makes quantized models. The engine runs them, and must do without.
MAKERS = (
    *("adaptive_rounding", "calibrate", "calibration_set", "capture", "checkpoint", "checkpoint_qdiff"),
    *("gptq", "observers", "reconstruction", "resume", "rounding_pass"),
)
CALIBRATION = tuple(f"qdiff.{name}" for name in MAKERS)
# Package -> the only places that may import it, wherever in a file the import stands.
HOMES = {
    "argparse": ("dsdiff/cli", "scripts"),
    "dsdiff.cli": ("dsdiff/cli", "scripts"),
    "pytorch_lightning": ("dsdiff/training",),
    "torchmetrics": ("dsdiff/metrics",),
    "torch_fidelity": ("dsdiff/metrics", "dsdiff/images"),
    "transformers": ("dsdiff/metrics",),
    "ctypes": ("qdiff/engine", "dsdiff/benchmark", "ldm/half_storage.py"),
    "fastapi": ("dsdiff/server",),
    "starlette": ("dsdiff/server",),
    "uvicorn": ("dsdiff/server",),
    "gradio": ("dsdiff/server/page",),
    "openvino": (),  # imported by name, in a process of its own
    "nncf": (),
}
# Text -> the only file that may hold it: there is one atomic writer, one file hash and one query of the CPU.
ONCE = {
    "os.replace(": "ldm/fileio.py",
    "file_digest(": "ldm/fileio.py",
    "/proc/cpuinfo": "qdiff/engine/cpu.py",
    ".__class__ =": None,
}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages or PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def out_of_layer(package: str, names: set[str]) -> set[str]:
    """Return those of the imported `names` that a source of `package` may not import."""
    ours = {name for name in names if within(name, PACKAGES) and not within(name, ALLOWED[package])}
    # `from a.b import c` is listed as a.b and as a.b.c: one of them within the allowed ones is enough.
    return {name for name in ours if not any(within(allowed, (name,)) for allowed in ALLOWED[package])}


def test_imports_stay_in_their_layer(imports_of):
    found = {relative(path): out_of_layer(path.relative_to(ROOT).parts[0], imports_of(path)) for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_engine_imports_no_calibration(imports_of):
    for path in sources("qdiff/engine"):
        names = {name for name in imports_of(path) if within(name, CALIBRATION)}
        assert not names, relative(path)


def test_each_import_has_its_home(imports_of):
    for path in sources():
        for package, homes in HOMES.items():
            if any(within(name, (package,)) for name in imports_of(path)):
                assert relative(path).startswith(homes), f"{relative(path)} imports {package}"


def test_what_there_is_once():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        for mark, home in ONCE.items():
            assert mark not in text or relative(path) == home, f"{relative(path)} holds {mark}"


def test_commands_are_thin():
    commands = [path for path in sources("scripts") if path.name != "__init__.py"]
    assert len(commands) >= 9
    for path in commands:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 150, relative(path)


def test_breaches_would_be_noticed(tmp_path, imports_of):
    path = tmp_path / "module.py"
    for package, source, found in (
        ("ldm", "import tomesd", {"tomesd"}),
        ("ldm", "import ldmx, torch\nfrom ldm.util import default", set()),
        ("tomesd", "def f():\n    from ldm.util import default", {"ldm.util", "ldm.util.default"}),
        ("tomesd", "from . import merge", set()),
        ("qdiff", "from ldm.modules.attention import CrossAttention\nimport qdiff.quant_layer", set()),
        ("qdiff", "from ldm.modules import attention", set()),
        ("qdiff", "from ldm.modules.ema import LitEma", {"ldm.modules.ema", "ldm.modules.ema.LitEma"}),
        ("qdiff", "import dsdiff.pipeline", {"dsdiff.pipeline"}),
        ("dsdiff", "import scripts.txt2img", {"scripts.txt2img"}),
        ("scripts", "from scripts import txt2img", {"scripts", "scripts.txt2img"}),
        ("scripts", "import ldm.util, tomesd, qdiff\nfrom dsdiff.pipeline import load", set()),
    ):
        path.write_text(source)
        assert out_of_layer(package, imports_of(path)) == found, source
    for source, found in (
        ("import qdiff.calibration_set", True),
        ("from qdiff import reconstruction", True),
        ("from qdiff.adaptive_rounding import Rounding", True),
        ("import qdiff.quant_layer, qdiff.calibration_free\nfrom qdiff import engine", False),
    ):
        path.write_text(source)
        assert any(within(name, CALIBRATION) for name in imports_of(path)) is found, source
