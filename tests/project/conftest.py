"""What the tests of the project read off its sources."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest


def _imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


@pytest.fixture
def imports_of() -> Callable[[Path], set[str]]:
    """Dotted names of all that a source imports, anywhere in it; `from a.b import c` gives a.b and a.b.c."""
    return _imports_of
