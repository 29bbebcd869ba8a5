#!/usr/bin/env python
"""Train a part of the embedded model from a config: python scripts/train.py --config configs/shapes/txt2img.yaml

The run lives in runs/<name of the config>: its last checkpoint, a CSV log, sample grids. It may be interrupted; the
same command then goes on from the last checkpoint. At the end the weights are written in float16 to the config's
`export`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsdiff.cli.console import ArgumentParser, command, number


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="a file of configs/shapes: what to train, on what, for how long"
    )
    parser.add_argument("--outdir", type=Path, help="the run's folder (default: runs/<name of the config>)")
    parser.add_argument("--restart", action="store_true", help="begin anew although the folder holds a run")
    parser.add_argument("--max_steps", type=number(int, 1), help="stop after so many steps (default: the config's)")
    parser.add_argument("--export", help="where to write the float16 weights (default: the config's; '' writes none)")
    parser.add_argument(
        "--export_only", action="store_true", help="do not train; write the weights of the last checkpoint"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--devices",
        type=number(int, 1),
        default=1,
        help="number of GPUs, or of processes on the CPU, where one per core is fastest",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**31), default=0, help="seed of weights, order and noise (default: 0)"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)

    from dsdiff.training.loop import run
    from dsdiff.training.options import TrainingOptions

    path = run(TrainingOptions(**vars(args)))
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
