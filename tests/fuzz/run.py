#!/usr/bin/env python
"""Let every loader read many damaged variants of a file that it reads.

    python tests/fuzz/run.py [--tries 2000] [--seed 0] [--only NAME]

Prints a table of how many were read and refused, with a line for each that did anything else: another error, a message
of several lines, more than 5 s of a CPU, more than --megabytes of memory. Exits with 1 if any did. Linux only.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsdiff import ModelOptions, find_model
from tests.fuzz.loading import damages, load
from tests.fuzz.targets import Target, targets
from tests.small_model import write_small_model


@dataclass(kw_only=True)
class Tally:
    """What became of the variants of a file. kind: of damage. slowest: seconds of a CPU. bad: a line for each fault."""

    name: str
    kind: str
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    bad: Counter[str] = field(default_factory=Counter)

    def cell(self) -> str:
        """Return "wrong / read / tried" for the table."""
        wrong = self.bad.total()
        return f"{wrong} / {self.read} / {wrong + self.read + self.refused}"


def tally(target: Target, kind: str, args: argparse.Namespace, place: Path) -> Tally:
    """Let a loader read variants of its file, damaged in this way."""
    found = Tally(name=target.name, kind=kind)

    @seed(args.seed)
    @settings(
        max_examples=args.tries,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(target)[kind])
    def each(content: bytes) -> None:
        start = time.process_time()
        try:
            with no_more_than(args.megabytes):
                read = load(target, content, place)
        except Exception as error:  # whatever it is, it is what is looked for
            found.bad[f"{type(error).__name__}: {str(error)[:150]}"] += 1
        else:
            found.read += read
            found.refused += not read
        found.slowest = max(found.slowest, time.process_time() - start)

    each()
    return found


def table(found: Sequence[Tally]) -> str:
    """Return a Markdown table: a row for each file, a column for each kind of damage."""
    kinds = list(dict.fromkeys(each.kind for each in found))
    cells = {(each.name, each.kind): each.cell() for each in found}
    lines = [["wrong / read / tried", *kinds], ["---"] * (1 + len(kinds))]
    lines += [
        [name, *(cells.get((name, kind), "-") for kind in kinds)] for name in dict.fromkeys(name for name, _ in cells)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextmanager
def no_more_than(megabytes: int) -> Iterator[None]:
    """Let this process allocate so much more than it has within the block, and not more."""
    held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert held is not None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held[1]) * 1024 + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=2000, metavar="N", help="of each file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (default: %(default)s)")
    parser.add_argument(
        "--megabytes", type=int, default=300, metavar="N", help="that a loader may take (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of a file in targets.py")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that seconds are those of one CPU
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder)
        config, ckpt = write_small_model(place, "small", {})
        files = targets(find_model(ModelOptions(config=config, ckpt=ckpt)), place)
        files = [each for each in files if not args.only or each.name in args.only]
        for target in files:  # once, so that all that is imported and cached is there
            load(target, target.content, place)
        found = []
        for target, kind in tqdm([(each, kind) for each in files for kind in damages(each)], unit="file"):
            found.append(tally(target, kind, args, place))
            for line, count in found[-1].bad.items():
                tqdm.write(f"{target.name}, {kind}: {count} x {line}")
    print(f"{table(found)}\n\nslowest: {max(each.slowest for each in found):.2f} s of a CPU")
    return int(any(each.bad for each in found))


if __name__ == "__main__":
    sys.exit(main())
