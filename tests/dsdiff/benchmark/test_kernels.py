"""Kernels timed one by one: what the table holds, and what is refused."""

import json

import pytest

from dsdiff.benchmark import kernels
from dsdiff.benchmark.options import BenchmarkOptions
from qdiff.engine import native
from qdiff.engine.backends import onednn


@pytest.mark.skipif(not native.has_attention(), reason="this CPU, or its compiler, has no kernels")
def test_each_kernel_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "ATTENTIONS", ((20, 77, 40),))
    monkeypatch.setattr(kernels, "FEATURES", (2, 64, 6, 6))
    monkeypatch.setattr(kernels, "SIDE", 6)
    monkeypatch.setattr(kernels, "TINY_SIDES", (8,))
    figures = kernels.benchmark(BenchmarkOptions(kernels=True, repeats=2, seconds=0.0))
    kernels.write(figures, tmp_path / "new")
    rows = json.loads((tmp_path / "new" / "kernels.json").read_text())["kernels"]
    names = {row["name"].partition(",")[0] for row in rows}
    decoders = {"tiny decoder"} if onednn.largest_exact_weight() == onednn.LARGEST else set()
    memory_bound = {"quantize", "group norm + SiLU", "layer norm", "GEGLU"}
    assert names == {"attention", "nearest of 9 tokens"} | decoders | memory_bound
    assert all(row["seconds"]["median"] > 0 and row["ratio"]["min"] > 0 for row in rows)
    table = (tmp_path / "new" / "kernels.md").read_text()
    assert table.count("%") == 3 * 8 and "attention, 20 queries, 77 keys" in kernels.text(figures)


def test_without_kernels_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "has_attention", lambda: False)
    with pytest.raises(ValueError, match="a C compiler, Linux, and a CPU with AVX2"):
        kernels.benchmark(BenchmarkOptions(kernels=True))


def test_options_without_effect_are_refused():
    for option in ({"engines": ("int8",)}, {"pictures": True}, {"batch": 1}, {"full": True}, {"isa": ()}):
        with pytest.raises(ValueError, match="no effect on single kernels"):
            BenchmarkOptions(kernels=True, **option)
