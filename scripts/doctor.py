#!/usr/bin/env python
"""Tell what is installed here, what the CPU can do, which models are found, and which jobs there is room for.

    python scripts/doctor.py

A line that begins with "->" tells what to do about the line above it. The exit status is 0 whatever is found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsdiff.cli.console import ArgumentParser, command


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--outdir", type=Path, default=Path("outputs"), metavar="DIR", help="whose disk is looked at (default: outputs)"
    )
    args = parser.parse_args(argv)

    from dsdiff.doctor import examine

    topic = None
    for finding in examine(args.outdir):
        print(f"{'' if finding.topic == topic else finding.topic:10}{finding.text}")
        if finding.advice is not None:
            print(f"{'':10}-> {finding.advice}")
        topic = finding.topic


if __name__ == "__main__":
    main()
