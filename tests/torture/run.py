#!/usr/bin/env python
"""Torture the commands: kill and stop them at random moments, on full disks, beside each other.

    python tests/torture/run.py [--kills 20] [--seed 0] [--only NAME]

Prints a table, with a line for everything that went wrong, and exits with 1 if anything did.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.torture.faults import Outcome, Torturer
from tests.torture.subjects import SUBJECTS


def outcomes(place: Path, kills: int, stops: int, seed: int, only: list[str]) -> Iterator[Outcome]:
    torturer = Torturer(place, seed)
    for subject in SUBJECTS:
        if only and subject.name not in only:
            continue
        yield torturer.stop(subject, signal.SIGKILL, kills)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            yield torturer.stop(subject, number, stops)
        yield torturer.full_disk(subject)
        yield torturer.no_folder(subject)
        yield torturer.two_at_once(subject)


def table(found: list[Outcome]) -> str:
    """Return a Markdown table: a row for each fault, a column for each command, "wrong / tried" in a cell."""
    # A fault that was not tried once, as a small disk without the right to mount one, is not possible here.
    cells = {(each.fault, each.subject): f"{len(each.bad)} / {each.tried}" if each.tried else "-" for each in found}
    faults, commands = dict.fromkeys(each.fault for each in found), dict.fromkeys(each.subject for each in found)
    lines = [["went wrong / tried", *commands], ["---"] * (1 + len(commands))]
    lines += [[fault, *(cells[fault, each] for each in commands)] for fault in faults]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each command (default: 20)")
    parser.add_argument("--stops", type=int, default=5, metavar="N", help="by each other signal (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of a command in subjects.py")
    args = parser.parse_args()
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        for each in tqdm(outcomes(Path(place), args.kills, args.stops, args.seed, args.only), unit="fault"):
            found.append(each)
            for line in each.bad:
                tqdm.write(f"{each.subject}, {each.fault}: {line}")
            tqdm.write(f"{each.subject}, {each.fault}: {len(each.bad)} went wrong of {each.tried} tried")
    print(table(found))
    return int(any(each.bad for each in found))


if __name__ == "__main__":
    sys.exit(main())
