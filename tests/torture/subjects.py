"""The commands that are tortured: how they begin, how they go on, and which of their results must be the same."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a command that takes longer hangs
DRAWING = ("--device", "cpu", "--ddim_steps", "4")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A command on the embedded model.

    script: its file in scripts/. flags: those of a run that writes to a folder. resumed: what is added where the folder
    tells that a run was begun. results: the hash of each result, by name.
    """

    name: str
    script: str
    flags: Callable[[Path], Sequence[str | Path]]
    resumed: Callable[[Path], Sequence[str]]
    results: Callable[[Path], dict[str, str]]

    def command(self, folder: Path) -> list[str]:
        """Return the command line that begins the work in `folder`, or goes on with it."""
        words = (self.script_path, *self.flags(folder), *self.resumed(folder))
        return [sys.executable, *map(str, words)]

    @property
    def script_path(self) -> Path:
        return ROOT / "scripts" / self.script


@dataclass(frozen=True, kw_only=True)
class End:
    """How a process ended: its status, and the last line that it printed."""

    status: int
    line: str
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command, with one thread, whose output goes to a file beside its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    with open(_output(folder), "wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=heed_signals,
        )


def heed_signals() -> None:
    """Undo what shells and nohup do to a process in the background, which hands it on: ignore SIGINT or SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes], folder: Path) -> End:
    """Wait for the end of a command that `start` began. One that hangs is killed, and its status is -9."""
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    text = _output(folder).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return End(status=process.returncode, line=lines[-1].strip() if lines else "", output=text)


def run(command: Sequence[str], folder: Path) -> End:
    return end(start(command, folder), folder)


def _output(folder: Path) -> Path:
    return folder.with_name(folder.name + ".output")


# --- results -----------------------------------------------------------------------------------------------


def of_files(*patterns: str) -> Callable[[Path], dict[str, str]]:
    """Return a function that hashes the files of a folder that match."""

    def results(folder: Path) -> dict[str, str]:
        paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    return results


def of_scores(folder: Path) -> dict[str, str]:
    """Return the scores in scores.json, without the time it took and the folders' names."""
    path = folder / "scores.json"
    return {"scores": json.dumps(json.loads(path.read_text())["scores"], sort_keys=True)} if path.exists() else {}


def of_table(folder: Path) -> dict[str, str]:
    """Return the pictures of a table, and its scores without times and without the folder's name."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: untimed(each) for name, each in value.items() if name not in TIMED}
        return [untimed(each) for each in value] if isinstance(value, list) else value

    path = folder / "results.json"
    pictures = of_files("pictures/**/*.png")(folder)
    if not path.exists():
        return pictures
    rows = json.dumps(untimed(json.loads(path.read_text())["rows"]), sort_keys=True)
    return pictures | {"rows": rows.replace(str(folder), "")}


TIMED = ("unet", "picture")
TABLE = Path(__file__).parent / "table.yaml"

SUBJECTS = (
    Subject(
        name="generation",
        script="txt2img.py",
        flags=lambda folder: (
            *("--prompt", "a red circle above a blue square", "--n_iter", "4", "--n_samples", "2"),
            *(*DRAWING, "--outdir", folder),
        ),
        resumed=lambda folder: ("--resume",) if (folder / "settings.yaml").exists() else (),
        results=of_files("samples/*.png", "*.png", "settings.yaml"),
    ),
    Subject(
        name="calibration",
        script="calibrate.py",
        flags=lambda folder: (
            *("--quant_act", "--split", "--cond", "--rounding", "gptq", "--samples_w", "8", "--iters_a", "2"),
            *("--cali_n", "4", "--cali_st", "2", *DRAWING, "--outdir", folder),
        ),
        resumed=lambda folder: ("--resume",) if (folder / "progress").exists() else (),
        results=of_files("cali.safetensors"),
    ),
    Subject(
        name="export",
        script="export.py",
        flags=lambda folder: (folder / "w4a8.safetensors",),
        resumed=lambda folder: (),
        results=of_files("w4a8.safetensors"),
    ),
    Subject(
        name="evaluation",
        script="eval_fid.py",
        flags=lambda folder: (
            *("shapes", "--n", "48", "--reference", "shapes", "--reference_n", "64", "--features", "shapes"),
            *("--device", "cpu", "--outdir", folder, "--cache", folder / "cache"),
        ),
        resumed=lambda folder: (),
        results=of_scores,
    ),
    Subject(
        name="table of results",
        script="reproduce.py",
        flags=lambda folder: (
            *("--table", TABLE, "--pictures", "4", "--repeats", "1", "--device", "cpu"),
            *("--outdir", folder, "--cache", folder / "cache"),
        ),
        resumed=lambda folder: (),
        results=of_table,
    ),
)
