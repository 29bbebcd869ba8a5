"""Measure how long a command takes to start, in fresh processes.

Two things are measured: scripts/txt2img.py --help, and the time from the start of a process to the first step of a
model, with the share of imports (those at first use included), of reading config and weights, and of preparing the
model: quantizing and lowering it. The rest is the start of Python, and the text encoder's work.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.first_step import MARK
from dsdiff.benchmark.options import BenchmarkOptions
from dsdiff.benchmark.process import WorkerError, python_command, python_environment
from dsdiff.environment import choose_device, machine
from dsdiff.models.registry import EMBEDDED, ROOT

logger = logging.getLogger(__name__)

IMPORT = "import time:"  # begins the lines of python -X importtime: own time | with what it imports | name


@dataclass(frozen=True, kw_only=True)
class Start:
    """The seconds of one start.

    seconds: from the start of the process to its end, or to the first step. cpu: CPU time of all its threads. imports,
    reading, preparing: parts of `seconds`, None where there is no model.
    """

    seconds: float
    cpu: float
    imports: float | None = None
    reading: float | None = None
    preparing: float | None = None


@dataclass(frozen=True, kw_only=True)
class StartFigures:
    """The figures of several starts of one command, as in Start. cpu and the parts are medians."""

    seconds: Spread
    cpu: float
    imports: float | None
    reading: float | None
    preparing: float | None


@dataclass(frozen=True, kw_only=True)
class StartupReport:
    """The results. machine: see `dsdiff.environment.machine`. starts: name of what was started -> its figures."""

    machine: dict[str, Any]
    repeats: int
    starts: dict[str, StartFigures]


def startup(options: BenchmarkOptions) -> StartupReport:
    """Measure all starts in turn, after an untimed one of each. Raises WorkerError if a process fails.

    With the model sd-v1, a bundle of its shapes with random weights takes part; it is made in outdir where it is not
    there yet.
    """
    device = choose_device(options.device)
    embedded = {"ckpt": None, "config": str(EMBEDDED)}
    common = {"device": str(device), "threads": options.threads}
    starts: dict[str, Callable[[], Start]] = {
        "txt2img.py --help": help_start,
        "embedded model": lambda: model_start({**embedded, "ptq": False, **common}),
        "embedded model, --ptq": lambda: model_start({**embedded, "ptq": True, **common}),
    }
    if options.model == "sd-v1":
        bundle = {"ckpt": str(random_bundle(options.outdir)), "config": None}
        starts["sd-v1 bundle"] = lambda: model_start({**bundle, "ptq": False, **common})
    found: dict[str, list[Start]] = {name: [] for name in starts}
    for i in tqdm(range(1 + options.repeats), "starting", unit="repeat"):
        for name, start in starts.items():
            measured = start()
            if i > 0:  # the first one brings the files into memory
                found[name].append(measured)
    figures = {name: _figures(values) for name, values in found.items()}
    return StartupReport(machine=machine(device), repeats=options.repeats, starts=figures)


def random_bundle(outdir: Path) -> Path:
    """Return a bundle of Stable Diffusion v1's shapes in outdir, made where it is not there yet."""
    from dsdiff.export import export_random

    path = outdir / "startup" / "sd-v1-w4a8.safetensors"
    if not path.exists():
        logger.info("making %s", path)
        export_random(path)
    return path


# --- one start ---------------------------------------------------------------------------------------------


def help_start() -> Start:
    """Run txt2img.py --help. Its CPU time is 0 where the system does not tell (Windows)."""
    before, begin = os.times(), time.perf_counter()
    _run([sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--help"])
    seconds, after = time.perf_counter() - begin, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Start(seconds=seconds, cpu=cpu)


def model_start(request: dict[str, Any]) -> Start:
    """Start a process that draws until the first step. request: the arguments of `draw_until_first_step`."""
    begin = time.time()
    told = _run([*python_command("dsdiff.benchmark.first_step", "-X", "importtime"), json.dumps(request)])
    return read_marks(told, begin)


def read_marks(told: str, begin: float) -> Start:
    """Return a start from the marks and import times in `told`. begin: when the process began, in the time of day.

    The time between two marks is split into that of the imports within it and the rest.
    """
    last, cpu, imports = begin, 0.0, 0.0
    phases: dict[str, tuple[float, float]] = {}  # the mark at its end -> seconds, imports
    for line in told.splitlines():
        if line.startswith(IMPORT):
            own = line.removeprefix(IMPORT).split("|")[0].strip()
            imports += int(own) / 1e6 if own.isdecimal() else 0.0  # the first line is a head
        elif line.startswith(MARK):
            name, now, cpu_now = line.removeprefix(MARK).strip().rsplit(" ", 2)
            phases[name] = (float(now) - last, imports)
            last, cpu, imports = float(now), float(cpu_now), 0.0
    if "first step" not in phases:
        raise WorkerError("the process ended before its first step")
    return Start(
        seconds=last - begin,
        cpu=cpu,
        imports=sum(within for _, within in phases.values()),
        reading=_without_imports(phases, "weights read"),
        preparing=_without_imports(phases, "model ready"),
    )


def _without_imports(phases: dict[str, tuple[float, float]], name: str) -> float:
    seconds, imports = phases[name]
    return seconds - imports


def _run(command: list[str]) -> str:
    """Run a command; return its stderr. Raises WorkerError with its last line if it fails."""
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=python_environment())
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith((IMPORT, MARK))]
        raise WorkerError(lines[-1].strip() if lines else f"a process ended with status {result.returncode}")
    return result.stderr


# --- figures -----------------------------------------------------------------------------------------------


def _figures(starts: list[Start]) -> StartFigures:
    def median(name: str) -> float | None:
        values = [getattr(start, name) for start in starts]
        return None if None in values else statistics.median(values)

    return StartFigures(
        seconds=Spread.over([start.seconds for start in starts]),
        cpu=statistics.median(start.cpu for start in starts),
        imports=median("imports"),
        reading=median("reading"),
        preparing=median("preparing"),
    )


def write(report: StartupReport, outdir: Path) -> None:
    """Write startup.json and startup.md into outdir."""
    from dsdiff.benchmark.report import piped, write_text

    outdir.mkdir(parents=True, exist_ok=True)
    write_text(outdir / "startup.json", json.dumps(asdict(report), indent=2) + "\n")
    write_text(outdir / "startup.md", f"{piped(table(report))}\n\n{remark(report)}\n")


def text(report: StartupReport) -> str:
    """Return the table for the terminal."""
    from dsdiff.benchmark.report import aligned

    return "\n".join([*(line for line in aligned(table(report)) if line), "", remark(report)])


def table(report: StartupReport) -> list[list[str]]:
    """Return a line for each start; imports, reading and preparing are parts of its seconds."""
    head = ["start of", "s", "CPU s", "imports", "reading", "preparing"]
    return [head, *([name, *_cells(start)] for name, start in report.starts.items())]


def _cells(start: StartFigures) -> list[str]:
    times = start.seconds
    parts = [start.imports, start.reading, start.preparing]
    whole = f"{times.median:.2f} ({times.min:.2f}..{times.max:.2f})"
    return [whole, f"{start.cpu:.2f}", *("-" if part is None else f"{part:.2f}" for part in parts)]


def remark(report: StartupReport) -> str:
    """Return a sentence on the machine and the way of measuring."""
    facts = report.machine
    return (
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}; seconds from the start of the process to its "
        f"end (--help) or to the first step of the UNet, median (least..most) of {report.repeats} fresh processes."
    )
