"""The query of the CPU: caps, what they allow, and what is told without PyTorch's own query."""

import pytest
import torch

from qdiff.engine import cpu

FLAGS = {
    "AVX2": "fma avx2",
    "AVX2_VNNI": "fma avx2 avx_vnni",
    "AVX512_CORE": "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl",
    "AVX512_CORE_VNNI": "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512_vnni",
    "AVX512_CORE_BF16": "fma avx2 avx_vnni avx512f avx512cd avx512bw avx512dq avx512vl avx512_vnni avx512_bf16",
    "AVX512_CORE_AMX": "fma avx2 avx_vnni avx512f avx512cd avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 "
    "amx_tile amx_int8 amx_bf16",
}


@pytest.fixture
def uncapped(monkeypatch):
    for variable in cpu.CAPS:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.fixture
def pretend(uncapped):
    """(flags) -> this is a Linux CPU with these flags, and PyTorch is one that does not tell them."""

    def pretend(flags):
        uncapped.delattr(torch.cpu, "get_capabilities", raising=False)
        uncapped.setattr(cpu, "_linux_facts", lambda: {"flags": flags, "model name": "Some CPU"})
        cpu.features.cache_clear()

    yield pretend
    uncapped.undo()
    cpu.features.cache_clear()


def test_instruction_sets_are_told_by_the_flags_of_linux(pretend):
    for name, flags in {"": "sse4_1 avx", **FLAGS}.items():
        pretend(flags)
        assert cpu.isa() == name
        assert cpu.has_bfloat16() == ("BF16" in name or "AMX" in name), name
    assert cpu.model_name() == "Some CPU" and "amx_int8" in cpu.fingerprint()


def test_both_ways_to_tell_them_agree(uncapped):
    if not hasattr(torch.cpu, "get_capabilities") or not cpu._linux_facts().get("flags"):
        pytest.skip("this system has only one way")
    expected = cpu.features.__wrapped__()
    uncapped.delattr(torch.cpu, "get_capabilities")
    assert cpu.features.__wrapped__() == expected
    uncapped.setattr(cpu, "_linux_facts", dict)
    assert cpu.features.__wrapped__() <= expected


def test_a_cap_hides_what_is_above_it(pretend):
    allowed = {
        "AVX2": "AVX2",
        "AVX2_VNNI": "AVX2_VNNI",
        "AVX2_VNNI_2": "AVX2_VNNI",
        "AVX512_CORE": "AVX512_CORE",
        "avx512_core_vnni": "AVX512_CORE_VNNI",
        "AVX512_CORE_FP16": "AVX512_CORE_BF16",
        "AVX512_CORE_AMX": "AVX512_CORE_AMX",
        "ALL": "AVX512_CORE_AMX",
        "SSE41": "",
    }
    for variable in cpu.CAPS:
        for cap, expected in allowed.items():
            pretend(FLAGS["AVX512_CORE_AMX"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(variable, cap)
                assert cpu.isa() == expected, f"{variable}={cap}"
                assert cpu.has_bfloat16() == (expected in ("AVX512_CORE_BF16", "AVX512_CORE_AMX")), cap


def test_a_cap_gives_a_cpu_nothing_new(pretend):
    pretend(FLAGS["AVX2_VNNI"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSDIFF_MAX_CPU_ISA", "AVX512_CORE_AMX")
        assert cpu.isa() == "AVX2_VNNI"
        patch.setenv("DSDIFF_MAX_CPU_ISA", "AVX512_CORE")  # which does not include AVX-VNNI
        assert cpu.isa() == "AVX2"


def test_our_cap_counts_before_that_of_onednn(pretend):
    pretend(FLAGS["AVX512_CORE_AMX"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        patch.setenv("DSDIFF_MAX_CPU_ISA", "AVX512_CORE")
        assert cpu.isa() == "AVX512_CORE"
        patch.setenv("DSDIFF_MAX_CPU_ISA", "")
        assert cpu.isa() == "AVX2"


def test_unknown_caps_are_refused(uncapped):
    for variable in cpu.CAPS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, "AVX3")
            with pytest.raises(ValueError, match=f"{variable} is 'AVX3': it must be one of AVX2, AVX2_VNNI, "):
                cpu.isa()
