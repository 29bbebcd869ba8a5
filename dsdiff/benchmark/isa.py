"""Measure under caps of the instruction set, each in a process of its own, and compare.

`capped_environment` says what a cap applies to. A process that runs under one is started by
`python -m dsdiff.benchmark.isa OPTIONS`; its tables go to OUTDIR/CAP.
"""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdiff.benchmark.options import BenchmarkOptions, Draw
from dsdiff.benchmark.process import WorkerError, python_command, python_environment

# One line for the tables. PyTorch's matrix products in float32 are MKL's, which on AMD chooses for itself.
APPLIES = (
    "A cap holds for our kernels, for oneDNN (PyTorch's and OpenVINO's), and below AVX-512 for PyTorch's own operators "
    "and MKL. OpenVINO's other kernels (norms, elementwise) keep the CPU's own instructions, and its bfloat16 becomes "
    "float32 where the cap has none. stable-diffusion.cpp is compiled for this CPU and knows no cap."
)


def capped_environment(cap: str) -> dict[str, str]:
    """Return the environment variables of a process under a cap."""
    caps = {"DSDIFF_MAX_CPU_ISA": cap, "ONEDNN_MAX_CPU_ISA": cap}
    if cap.startswith("AVX2"):
        caps |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    return {**python_environment(), **caps}


def caps_here(wanted: Sequence[str]) -> list[str]:
    """Return the caps to measure under: those asked for, or all that this CPU has.

    Raises ValueError for a cap that this CPU is below, and for a CPU that is below all caps.
    """
    from qdiff.engine import cpu

    own = [name for name in cpu.ISAS if cpu.ISAS[name] <= cpu.features()]
    missing = [name for name in wanted if name not in own]
    if missing or not own:
        lacks, has = ", ".join(missing) or "AVX2", ", ".join(own) or "none of the caps"
        raise ValueError(f"this CPU has no {lacks}: it has {has}")
    return list(dict.fromkeys(wanted)) or own


def benchmark(options: BenchmarkOptions) -> str:
    """Measure under each cap; write isa.json and isa.md to OUTDIR, and return the table as text.

    Raises ValueError for a cap that this CPU is below, and WorkerError if a process fails.
    """
    from dsdiff.benchmark.report import aligned, piped, write_text

    caps = caps_here(options.isa or ())
    reports = {cap: _measured_under(cap, options) for cap in caps}
    whole = table(reports, options.pictures)
    write_text(options.outdir / "isa.json", json.dumps(reports, indent=2) + "\n")
    write_text(options.outdir / "isa.md", "\n\n".join([piped(whole), APPLIES, *_left_out(reports)]) + "\n")
    return "\n".join([*aligned(whole), "", APPLIES, *_left_out(reports)])


def table(reports: Mapping[str, Mapping[str, Any]], pictures: bool) -> list[list[str]]:
    """Return a line for each row of the reports, and a column for each cap.

    A cell has the median seconds, times float32, and times OpenVINO's int8, both under the same cap.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for cap, report in reports.items():
        for row in report["rows" if pictures else "settings"]:
            key = (_draw(row), row["name"]) if pictures else (row["engine"],)
            found.setdefault((*key, f"{row['ratio']:g}"), {})[cap] = _cell(row, "total" if pictures else "seconds")
    head = [*(["steps", "by"] if pictures else ["engine"]), "ratio"]
    unit = "s, x float32, x openvino-int8"
    lines = [[*key, *(cells.get(cap, "-") for cap in reports)] for key, cells in found.items()]
    return [[*head, *(f"{cap}: {unit}" if i == 0 else cap for i, cap in enumerate(reports))], *lines]


def _cell(row: Mapping[str, Any], seconds: str) -> str:
    ratios = [row["speedup"], row["speedup_openvino"]]
    return ", ".join([f"{row[seconds]['median']:.3g}", *("-" if r is None else f"{r['median']:.3g}" for r in ratios)])


def _draw(row: Mapping[str, Any]) -> str:
    return str(Draw(sampler=row["sampler"], steps=row["steps"], scale=row["scale"], tiny=row["tiny"]))


def _left_out(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    reasons = [(name, cap, why) for cap in reports for name, why in reports[cap]["left_out"].items()]
    lines = [f"{name} is left out under {cap}: {why}." for name, cap, why in reasons]
    return ["\n".join(lines)] if lines else []


# --- a process under a cap ---------------------------------------------------------------------------------


def _measured_under(cap: str, options: BenchmarkOptions) -> dict[str, Any]:
    """Measure in a process under a cap; return its report, as read from its JSON file. Its bars go to our stderr."""
    command = [*python_command("dsdiff.benchmark.isa"), cap, to_json(options)]
    print(f"under {cap}:", file=sys.stderr, flush=True)
    if subprocess.run(command, env=capped_environment(cap), stdout=subprocess.DEVNULL).returncode:
        raise WorkerError(f"the benchmark under {cap} failed: see above")
    name = "pictures.json" if options.pictures else "benchmark.json"
    return json.loads((options.outdir / cap / name).read_text(encoding="utf-8"))


def to_json(options: BenchmarkOptions) -> str:
    """Return options as JSON, for `from_json`."""
    return json.dumps(dataclasses.asdict(options), default=str)


def from_json(text: str) -> BenchmarkOptions:
    """Return the options that `to_json` wrote."""
    plain = json.loads(text)
    paths = {name: Path(plain[name]) for name in ("config", "outdir") if plain[name] is not None}
    tuples = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    draws = tuple(Draw(**draw) for draw in plain["draws"])
    return BenchmarkOptions(**{**plain, **tuples, **paths, "draws": draws})


def main(arguments: Sequence[str]) -> None:
    from dsdiff.benchmark.modes import measure

    cap, text = arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = from_json(text)
    try:
        measure(options, options.outdir / cap)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
