"""The files around the code: versions, commands, sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import yaml

from dsdiff.options import (
    DrawOptions,
    EmbeddingOptions,
    InitOptions,
    LoraOptions,
    MergeOptions,
    ModelOptions,
    QuantizationOptions,
)

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
    with_torch = {"triton"}  # comes with PyTorch where it is built for CUDA, and is imported where there is a GPU
    ours = {*OURS, *sys.stdlib_module_names, *with_torch}
    imported = {name.split(".")[0] for path in paths for name in imports_of(path)} - ours
    by_tests = set().union(*(loaded_by_name(path) for path in (ROOT / "tests").rglob("*.py")))
    by_make = {"ruff", "pyright", "pytest-xdist"}
    used = {PACKAGE_NAMES.get(module, module) for module in (imported | by_tests) - with_torch} | by_make
    files = (ROOT / "requirements.txt", ROOT / "requirements-web.txt")
    required = pins(line for file in files for line in file.read_text().splitlines()).keys()
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


# --- documents ---------------------------------------------------------------------------------------------

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "scripts").glob("*.md"),
        *(ROOT / "tests/goldens").glob("*.md"),
    ]
)
MOST_LINES = 120  # of the README
NO_DOCSTRING_OPENS_WITH = ("Of", "What", "Those", "Whether")


def prose(text: str) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[tuple[str, str]]:
    """Return the links to files of this repository, each as path ("" for the document itself) and anchor."""
    found = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if "://" not in link]
    return [(path, anchor) for path, _, anchor in (link.partition("#") for link in found)]


def shell_blocks(text: str) -> list[str]:
    """Return the document's blocks of shell code."""
    return re.findall(r"^```sh$(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the command lines in a document's blocks of shell code: the script's name, and the flags."""
    lines = [line.partition("#")[0] for block in shell_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.search(r"scripts/(\w+\.py)(.*)", line) for line in lines]
    return [(call[1], re.findall(r"(?<=\s)--([\w-]+)", call[2])) for call in calls if call]


def test_links_and_anchors_of_documents_exist():
    count = 0
    for document in DOCUMENTS:
        for path, anchor in links(document.read_text(encoding="utf-8")):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.relative_to(ROOT)}: {path}"
            if anchor:
                found = anchors(target.read_text(encoding="utf-8"))
                assert anchor in found, f"{document.relative_to(ROOT)}: {path}#{anchor}"
            count += 1
    assert count > 50


def test_flags_in_documents_exist():
    cli = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "dsdiff/cli").glob("*.py")}
    count = 0
    for document in DOCUMENTS:
        for script, flags in commands(document.read_text(encoding="utf-8")):
            assert (ROOT / "scripts" / script).is_file(), f"{document.relative_to(ROOT)}: {script}"
            source = (ROOT / "scripts" / script).read_text(encoding="utf-8")
            used = [name for name in cli if name == "arguments" or f"{name}.add_arguments" in source]
            shared = "".join(cli[name] for name in used)
            known = re.findall(r'"--([\w-]+)"', shared + source)
            unknown = [flag for flag in flags if flag.removeprefix("no-") not in known]
            assert not unknown, f"{document.relative_to(ROOT)}: {script} has no {unknown}"
            count += len(flags)
    assert count > 50


def test_all_fields_of_options_are_in_the_api_document():
    rows = [line for line in (ROOT / "docs/api.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for kind in (
        ModelOptions,
        DrawOptions,
        InitOptions,
        LoraOptions,
        EmbeddingOptions,
        QuantizationOptions,
        MergeOptions,
    ):
        (row,) = (row for row in rows if f"`{kind.__name__}`" in row.split("|")[1])
        missing = [field.name for field in fields(kind) if f"`{field.name}`" not in row]
        assert not missing, f"docs/api.md: {kind.__name__} has {missing}"


def test_documents_are_read_as_meant():
    code = "```sh\n# h\npython scripts/i.py --j 1 \\\n --k # --l\n```\n"
    text = f"# One two\n[a](b.md#c-d) [e](https://f) [g](#one-two)\n{code}"
    assert links(text) == [("b.md", "c-d"), ("", "one-two")]
    assert anchors(text) == {"one-two"}
    assert commands(text) == [("i.py", ["j", "k"])]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_each_command_has_its_line():
    text = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")


def test_no_docstring_opens_as_a_riddle():
    riddles = []
    for path in (path for folder in OURS if folder != "tests" for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0] in NO_DOCSTRING_OPENS_WITH:
                    line = getattr(node, "lineno", 1)
                    riddles.append(f"{path.relative_to(ROOT)}:{line}: {' '.join(words[:8])}")
    assert not riddles, "\n".join(riddles)


# --- commands and files ------------------------------------------------------------------------------------


def test_make_targets_in_documents_exist():
    named = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named.update(re.findall(r"`make ([a-z-]+)", prose(text)))
        named.update(re.findall(r"^make ([a-z-]+)", "".join(shell_blocks(text)), flags=re.MULTILINE))
    assert {"demo", "test", "test-isa", "fast", "lint", "train", "bench"} <= named
    for target in named:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_embedded_model_is_there_and_small():
    assert (EMBEDDED / "model.safetensors").is_file() and (EMBEDDED / "reader.safetensors").is_file()
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 45e6


def test_embedded_model_has_the_autoencoder_that_was_trained():
    alone, whole = (
        yaml.safe_load((ROOT / "configs" / "shapes" / name).read_text())["model"]["params"]
        for name in ("autoencoder.yaml", "txt2img.yaml")
    )
    inside = whole["first_stage_config"]["params"]
    assert alone["ddconfig"]["z_channels"] == whole["channels"]
    assert (inside["ddconfig"], inside["embed_dim"]) == (alone["ddconfig"], alone["embed_dim"])
