"""Faults: what is done to a command while it works, and what must hold afterwards."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.torture.subjects import End, Subject, end, run, start
from tests.torture.wholeness import broken_files, leftovers

SMALL = "300k"  # of a disk


@dataclass(kw_only=True)
class Outcome:
    """What became of a fault on one command. tried: how often. bad: what went wrong, one line each."""

    subject: str
    fault: str
    tried: int = 0
    bad: list[str] = field(default_factory=list)


class Torturer:
    """Tortures commands in folders below `place`. Moments are drawn from `seed`."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.numbers = 0

    def folder(self) -> Path:
        """Return the name of a new folder, which is not there yet."""
        self.numbers += 1
        return self.place / f"run{self.numbers}"

    @cache  # noqa: B019 (one torturer a process)
    def reference(self, subject: Subject) -> tuple[float, Mapping[str, str]]:
        """Return the seconds that an undisturbed run takes, and its results."""
        folder = self.folder()
        began = time.monotonic()
        ended = run(subject.command(folder), folder)
        seconds = time.monotonic() - began
        results = subject.results(folder)
        if ended.status != 0 or not results:
            raise RuntimeError(f"{subject.name} fails undisturbed: {ended.line}")
        shutil.rmtree(folder)
        return seconds, results

    # --- signals -------------------------------------------------------------------------------------------

    def stop(self, subject: Subject, number: signal.Signals, times: int) -> Outcome:
        """Send a signal at random moments; each time, whatever is there must be whole, and lead to the same results."""
        outcome = Outcome(subject=subject.name, fault=f"{number.name} at a random moment")
        seconds, expected = self.reference(subject)
        for _ in range(times):
            folder, moment = self.folder(), self.random.uniform(0, seconds)
            process = start(subject.command(folder), folder)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            ended = end(process, folder)
            outcome.tried += 1
            outcome.bad += [f"at {moment:.1f} s: {line}" for line in self._wrong(ended, folder, number)]
            outcome.bad += [f"at {moment:.1f} s: {line}" for line in self._goes_on(subject, folder, expected)]
        return outcome

    def _wrong(self, ended: End, folder: Path, number: signal.Signals) -> Iterator[str]:
        yield from (f"broken: {name}" for name in broken_files(folder))
        if number == signal.SIGKILL:
            return
        # Python itself is killed by a signal that comes before our first line.
        if ended.status not in (0, 128 + number, -number):
            yield f"exit status {ended.status}: {ended.line}"
        if ended.status != -number:
            if ended.has_traceback:
                yield f"traceback: {ended.line}"
            yield from (f"left behind: {name}" for name in leftovers(folder))

    def _goes_on(self, subject: Subject, folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
        """Run the command again in the folder, and compare its results."""
        ended = run(subject.command(folder), folder)
        if ended.status != 0:
            yield f"does not go on: {ended.line}"
        elif subject.results(folder) != expected:
            yield "other results after going on"
        shutil.rmtree(folder, ignore_errors=True)

    # --- disks ---------------------------------------------------------------------------------------------

    def full_disk(self, subject: Subject) -> Outcome:
        """Work on a small disk, then make room and go on."""
        outcome = Outcome(subject=subject.name, fault=f"disk of {SMALL}B, then room")
        _, expected = self.reference(subject)
        folder = self.folder()
        with small_disk(folder) as grow:
            if grow is None:
                return outcome
            ended = run(subject.command(folder), folder)
            outcome.tried = 1
            if ended.status == 0:
                outcome.bad += [] if subject.results(folder) == expected else ["other results"]
                return outcome
            outcome.bad += [f"broken: {name}" for name in broken_files(folder)]
            outcome.bad += [f"left behind: {name}" for name in leftovers(folder)]
            if not is_refusal(ended):
                outcome.bad.append(f"exit status {ended.status}: {ended.line}")
            elif str(folder) not in ended.line:
                outcome.bad.append(f"names no file: {ended.line}")
            grow()
            again = run(subject.command(folder), folder)
            if again.status != 0:
                outcome.bad.append(f"does not go on: {again.line}")
            elif subject.results(folder) != expected:
                outcome.bad.append("other results after going on")
        return outcome

    def no_folder(self, subject: Subject) -> Outcome:
        """Write to a place that cannot be a folder, and to one that may only be read."""
        outcome = Outcome(subject=subject.name, fault="a folder that cannot be written to")
        file = self.folder()
        file.write_text("a file")
        self._refused(outcome, subject, file / "below", file)
        folder = self.folder()
        with small_disk(folder, "ro") as grow:
            if grow is not None:
                self._refused(outcome, subject, folder / "below", folder)
        return outcome

    def _refused(self, outcome: Outcome, subject: Subject, folder: Path, named: Path) -> None:
        output = self.folder()
        ended = run(subject.command(folder), output)
        outcome.tried += 1
        if not is_refusal(ended) or str(named) not in ended.line:
            outcome.bad.append(f"exit status {ended.status}: {ended.line}")

    # --- company -------------------------------------------------------------------------------------------

    def two_at_once(self, subject: Subject) -> Outcome:
        """Run the same command twice in one folder at the same time: one may be refused, nothing may be lost."""
        outcome = Outcome(subject=subject.name, fault="two at once in one folder", tried=1)
        _, expected = self.reference(subject)
        folder, other = self.folder(), self.folder()
        # The second one, which began to work before the folder was there, must not go on with the first one's.
        processes = [start(subject.command(folder), output) for output in (folder, other)]
        ends = [end(process, output) for process, output in zip(processes, (folder, other), strict=True)]
        outcome.bad += [
            f"exit status {each.status}: {each.line}" for each in ends if each.status and not is_refusal(each)
        ]
        outcome.bad += [f"broken: {name}" for name in broken_files(folder)]
        results = subject.results(folder)
        if all(each.status for each in ends):
            outcome.bad.append("both ended early")
        elif any(results.get(name) != value for name, value in expected.items() if not name.endswith(".yaml")):
            outcome.bad.append("other results")
        return outcome


def is_refusal(ended: End) -> bool:
    """Return whether a command ended as a bad input must end it: status 2, one line, no traceback."""
    return ended.status == 2 and ended.line.startswith("error:") and not ended.has_traceback


@contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[Callable[[], None] | None]:
    """Mount a small disk at a folder within the block; yield what makes it large, or None where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={SMALL}", *options)), "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        yield None
        return
    if done.returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=2g", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
