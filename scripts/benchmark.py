#!/usr/bin/env python
"""How fast is the UNet, and what does it need? python scripts/benchmark.py --repeats 5

Times single UNet calls as a guided step makes them (a batch of 2) at the model's latent size, by each --engine with
each --ratio of merged tokens:

  float32, bf16       the float UNet, all of it in that dtype
  simulate            quantized (W4A8), integers held as floats
  int8                quantized, on integer kernels; the rest in bfloat16 where the hardware has it
  int8-float32        the same, the rest in float32

All settings are gone through in turn, --repeats times, forwards and backwards; each measurement begins with an untimed
call (if calls take more than 10 s, in the first repeat only). Settings are compared within a repeat: speed-up is the
time of float32 without merging over the setting's, both of the same repeat. Tables show medians (min..max). --peers
adds what is installed of diffusers and OpenVINO, on the same UNet, each in a process of its own. --memory adds the peak
of each engine, in a process of its own as well.

Speed does not depend on the values of the weights: --random_weights measures the real shapes of Stable Diffusion v1, or
of any --config, without a checkpoint. Prints tables and writes benchmark.json, benchmark.md and benchmark.png to
OUTDIR.

--startup measures how long the commands take to start instead, and writes startup.json and startup.md: the seconds of
txt2img.py --help, and those from the start of a process to the first step of the embedded model, float and --ptq; with
--model sd-v1 also of a bundle of Stable Diffusion v1's shapes, which it makes in OUTDIR (850 MB).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.benchmark.options import DEFAULT_ENGINES, ENGINES, PEERS, WEIGHT_BITS, BenchmarkOptions
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.models.registry import CONFIGS


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=list(CONFIGS), help="(default: embedded)")
    which.add_argument("--config", type=Path, metavar="FILE", help="any model's yaml; needs --random_weights")
    add = parser.add_argument
    add("--random_weights", action="store_true", help="build the config's UNet without a checkpoint")
    engines = " ".join(DEFAULT_ENGINES)
    add("--engine", nargs="+", choices=ENGINES, metavar="E", help=f"(default: those that run of {engines})")
    add("--peers", nargs="*", choices=PEERS, metavar="P", help=f"all that is installed, or some of {' '.join(PEERS)}")
    add("--ratio", type=number(float, 0, 1), nargs="+", default=[0.0, 0.3, 0.5], metavar="X", help="(default: 0 .3 .5)")
    add("--weight_bit", type=int, choices=WEIGHT_BITS, default=4, help="of quantized engines (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory, too: each engine is built twice")
    add("--startup", action="store_true", help="measure how long the commands take to start, and nothing else")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="(default: %(default)s)")
    seconds = "a measurement is the mean of the calls that fit into N seconds, of one at least (default: %(default)s)"
    add("--seconds", type=number(float, 0), default=0.5, metavar="N", help=seconds)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=number(int, 1), metavar="N", help="of the CPU (default: torch's choice)")
    add("--outdir", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(default: %(default)s)")
    add("--verbose", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def benchmark_options(args: argparse.Namespace) -> BenchmarkOptions:
    """Return the options that the flags mean. Raises ValueError for flags that contradict each other."""
    return BenchmarkOptions(
        model=args.model,
        config=args.config,
        random_weights=args.random_weights,
        engines=None if args.engine is None else tuple(args.engine),
        peers=PEERS if args.peers == [] else tuple(args.peers or ()),
        ratios=tuple(args.ratio),
        weight_bit=args.weight_bit,
        memory=args.memory,
        repeats=args.repeats,
        seconds=args.seconds,
        device=args.device,
        threads=args.threads,
        outdir=args.outdir,
        startup=args.startup,
    )


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    options = benchmark_options(args)
    with logs(args.verbose):
        from tqdm import tqdm

        from dsdiff.benchmark import report, run, startup
        from ldm.fileio import check_writable

        check_writable(options.outdir)
        if options.startup:
            started = startup.startup(options)
            tqdm.write(startup.text(started))
            startup.write(started, options.outdir)
        else:
            measured = run.benchmark(options)
            tqdm.write(report.text(measured))
            report.write(measured, options.outdir)


if __name__ == "__main__":
    main()
