"""Compiling our kernels: without a compiler, and with a file in the cache that is not what was compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdiff.engine import cpu, native
from qdiff.engine.native import ARCHITECTURES, FUNCTIONS

ROOT = Path(__file__).parents[3]
HAS_LIBRARY = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
ON_LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not torch.backends.openmp.is_available(), reason="kernels are for Linux"
)
QUANTIZE = """
import torch
from qdiff.engine import fused_ops, native
params = fused_ops.QuantParams(delta=0.1, zero_point=3, high=255)
print(native.library() is not None, fused_ops.quantize(torch.arange(4.0).view(1, 4), params)[0].tolist())
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dsdiff"


def run(**env):
    """Quantize in a process of its own; return its output and its log."""
    process = subprocess.run(
        [sys.executable, "-c", QUANTIZE], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, f"exit {process.returncode} (-7 is a bus error): {process.stderr}"
    return process.stdout, process.stderr


@ON_LINUX
def test_without_a_compiler_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library.__wrapped__() is None
    assert caplog.text.count("\n") == 1 and "no C compiler" in caplog.text


@ON_LINUX
def test_a_command_that_is_no_compiler_leaves_nothing(monkeypatch, caplog, tmp_path, cache):
    fails = tmp_path / "cc"
    fails.write_text("#!/bin/sh\nfor last; do :; done\necho half > $last\necho 'kernels.c: no luck' >&2\nexit 1\n")
    fails.chmod(0o700)
    no_output = tmp_path / "true"
    no_output.write_text("#!/bin/sh\nexit 0\n")
    no_output.chmod(0o700)
    for command, says in ((fails, "no luck"), (no_output, "No such file"), ("/bin/false", "no kernels")):
        monkeypatch.setenv("CC", str(command))
        caplog.clear()
        assert native.library.__wrapped__() is None, command
        assert caplog.text.count("\n") == 1 and says in caplog.text, command
        assert not list(cache.iterdir()), command


def test_all_works_without_a_compiler():
    assert run(CC="/bin/false")[0] == "False [[3, 13, 23, 33]]\n"


@HAS_LIBRARY
def test_a_compiler_that_is_not_there_is_passed_over(monkeypatch):
    found = native._compiler()
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert native._compiler() is not None
    monkeypatch.setenv("CC", f"{found[0]} -g")
    assert native._compiler() == (found[0], "-g")


@pytest.mark.slow
@HAS_LIBRARY
def test_damaged_libraries_are_compiled_anew(cache):
    path = native._compiled(native._compiler())
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for name, damage in {
        "empty": b"",
        "cut": content[:3000],
        "half": content[: len(content) // 2],
        "without its seal": content[: -native.SEAL.size],
        "another byte": bytes(flipped),
        "text": b"no library" * 100,
    }.items():
        path.write_bytes(damage)
        assert not native._is_whole(path), name
        if name in ("half", "another byte"):
            output, log = run()
            assert output == "True [[3, 13, 23, 33]]\n", name
            assert log.count("damaged: compiling them anew") == 1, log
            assert native._is_whole(path), name


@HAS_LIBRARY
def test_it_is_compiled_once(cache, monkeypatch):
    old = os.umask(0o002)  # under which files are made that a group may write
    try:
        path = native._compiled(native._compiler())
    finally:
        os.umask(old)
    monkeypatch.setattr(native, "_make", None)
    assert native._compiled(native._compiler()) == path and list(cache.iterdir()) == [path]


@HAS_LIBRARY
def test_a_library_that_others_may_write_is_not_loaded(caplog, cache):
    native._compiled(native._compiler()).chmod(0o666)
    assert native.library.__wrapped__() is None
    assert "somebody else" in caplog.text


@HAS_LIBRARY
def test_a_cap_selects_the_architecture(cache, monkeypatch):
    commands = []

    def make(compiler, flags, sources, target):
        commands.append(flags)
        target.write_bytes(b"")

    monkeypatch.setattr(native, "_make", make)
    assert set(ARCHITECTURES) == {"", *cpu.ISAS}
    for variable in cpu.CAPS:
        monkeypatch.delenv(variable, raising=False)
    paths = [native._compiled(native._compiler())]
    for isa in cpu.ISAS:
        monkeypatch.setenv("DSDIFF_MAX_CPU_ISA", isa)
        paths.append(native._compiled(native._compiler()))
        assert commands[-1][: len(ARCHITECTURES[cpu.isa()])] == ARCHITECTURES[cpu.isa()], isa
    assert commands[0][0] == "-march=native"
    assert len(set(paths)) == 1 + len({ARCHITECTURES[isa] for isa in cpu.ISAS if cpu.ISAS[isa] <= cpu.features()})


@HAS_LIBRARY
def test_every_function_is_declared_as_in_c():
    text = "\n".join(path.read_text(encoding="utf-8") for path in native.SOURCES.glob("*.c"))
    kinds = {"int64_t": native._INT, "float": native._FLOAT}
    for name, (result, arguments) in FUNCTIONS.items():
        head = next(line for line in text.split("\n\n") if f" {name}(" in line and "{" in line)
        before, _, after = head.partition(f" {name}(")
        assert before.split()[-1] == ("void" if result is None else "int64_t"), name
        declared = [each.strip() for each in after.partition(")")[0].replace("\n", " ").split(",")]
        declared = [] if declared == ["void"] else declared
        expected = [
            (native._ParamsArray if "QuantParams" in each else native._Data) if "*" in each else kinds[each.split()[0]]
            for each in declared
        ]
        assert list(arguments) == expected, name


@HAS_LIBRARY
def test_arguments_of_other_types_are_refused():
    out = torch.zeros(1, 4, dtype=torch.uint8)
    for arguments in (
        ("x", 0, 1, 4, 4, [], 0, out),
        (torch.zeros(1, 4), 0.5, 1, 4, 4, [], 0, out),
        (torch.zeros(1, 4), 0, 1, 4, 4, out, 0, out),
        (torch.zeros(1, 4), 0, 1),
    ):
        with pytest.raises((TypeError, native.ctypes.ArgumentError)):
            native.call("quantize", *arguments)
