#!/usr/bin/env python
"""How fast is the UNet, and what does it need? python scripts/benchmark.py --repeats 5

Times single UNet calls as a guided step makes them (a batch of 2) at the model's latent size, by each --engine with
each --ratio of merged tokens:

  float32, bf16       the float UNet, all of it in that dtype
  fp16                the same on a GPU; fp16-channels-last: with feature maps in that order; fp16-compile: compiled by
                      torch.compile (max-autotune), which takes minutes, and without merging
  simulate            quantized (W4A8), integers held as floats
  int8                quantized, on integer kernels; the rest in bfloat16 where the hardware has it
  int8-float32        the same, the rest in float32; int8-dynamic(-mixed): with dynamic ranges (and six 12-bit inputs)

All settings are measured in turn, --repeats times, forwards and backwards; each measurement begins with an untimed
call (if calls take more than 10 s, in the first repeat only). Settings are compared within a repeat: speed-up is the
time of float32 without merging over the setting's, both of the same repeat. Tables show medians (min..max). --peers
adds diffusers and OpenVINO where they are installed, on the same UNet, each in a process of its own. --memory adds the
peak memory of each engine, in a process of its own as well.

Speed does not depend on the values of the weights: --random_weights measures the real shapes of Stable Diffusion v1, or
of any --config, without a checkpoint. Prints tables; writes benchmark.json, benchmark.md and benchmark.png to OUTDIR.

--pictures measures whole pictures instead: each in a process of its own, from the start of the process to the PNG on
disk, by {float32, bf16, int8} with each --ratio and drawn in each way of --draws, and by --peers (OpenVINO alone with
a tiny decoder). Of many steps it takes 4 (--steps_measured), and says so; --full takes all. Writes pictures.json, .md
and .png, and to OUTDIR/pictures the pictures and the files that they are drawn from, as of random weights.

--isa measures under caps of the instruction set, each in a process of its own; isa.md compares them. --kernels times
our C kernels one by one, beside PyTorch or a copy of the same features, for kernels.json and kernels.md. --startup
measures how long commands take to start: txt2img.py --help, and a process up to the first step of the embedded model,
float and --ptq, and with --model sd-v1 of a bundle of its shapes (850 MB in OUTDIR), for startup.json and startup.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path

from dsdiff.benchmark.options import (
    CALL_PEERS,
    CAPS,
    DEFAULT_ENGINES,
    DRAWS,
    ENGINES,
    PEERS,
    PICTURE_PEERS,
    WEIGHT_BITS,
    BenchmarkOptions,
    Draw,
)
from dsdiff.cli.console import ArgumentParser, command, logs, number
from dsdiff.models.registry import CONFIGS


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=list(CONFIGS), help="(default: embedded)")
    which.add_argument("--config", type=Path, metavar="FILE", help="any model's yaml; needs --random_weights")
    add = parser.add_argument
    add("--random_weights", action="store_true", help="build the UNet with random weights, without a checkpoint")
    engines = " ".join(DEFAULT_ENGINES)
    add("--engine", nargs="+", choices=ENGINES, metavar="E", help=f"(default: {engines}, those that run here)")
    add("--peers", nargs="*", choices=PEERS, metavar="P", help=f"all that is installed, or some of {' '.join(PEERS)}")
    ratios = "(default: 0 .3 .5; of pictures 0 .5)"
    add("--ratio", type=number(float, 0, 1), nargs="+", metavar="X", help=ratios)
    add("--weight_bit", type=int, choices=WEIGHT_BITS, default=4, help="of quantized engines (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory, too: each engine is built twice")
    add("--kernels", action="store_true", help="measure our C kernels one by one, and nothing else")
    add("--startup", action="store_true", help="measure how long the commands take to start, and nothing else")
    add("--batch", type=number(int, 1), default=2, metavar="N", help="samples of a UNet call (default: %(default)s)")
    add("--latents", type=size, metavar="HxW", help="size of a UNet call's latents (default: the model's)")
    add("--pictures", action="store_true", help="measure whole pictures in place of UNet calls")
    draws = "how to draw (default: plms:50 dpm_solver:20 dpm_solver:4:1 lcm:4:tiny)"
    add("--draws", type=draw, nargs="+", default=DRAWS, metavar="SAMPLER:STEPS[:SCALE][:tiny]", help=draws)
    steps = "take no more steps of a picture, and extrapolate (default: %(default)s)"
    add("--steps_measured", type=number(int, 2), default=4, metavar="N", help=steps)
    add("--full", action="store_true", help="measure all steps of a picture")
    add("--isa", nargs="*", choices=CAPS, metavar="CAP", help="measure under these caps of the instruction set, or all")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="(default: %(default)s)")
    seconds = "a measurement is the mean of the calls that fit into N seconds, of one at least (default: %(default)s)"
    add("--seconds", type=number(float, 0), default=0.5, metavar="N", help=seconds)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: torch's choice)")
    add("--outdir", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(default: %(default)s)")
    add("--verbose", action="store_true", help="show tracebacks of errors")
    return parser.parse_args(argv)


def draw(text: str) -> Draw:
    """Parse a way to draw."""
    try:
        return Draw.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    height, x, width = text.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 64x64")
    return int(height), int(width)


def benchmark_options(args: argparse.Namespace) -> BenchmarkOptions:
    """Return the options that the flags mean. Raises ValueError for flags that contradict each other."""
    return BenchmarkOptions(
        model=args.model,
        config=args.config,
        random_weights=args.random_weights,
        engines=None if args.engine is None else tuple(args.engine),
        peers=(PICTURE_PEERS if args.pictures else CALL_PEERS) if args.peers == [] else tuple(args.peers or ()),
        ratios=None if args.ratio is None else tuple(args.ratio),
        weight_bit=args.weight_bit,
        memory=args.memory,
        repeats=args.repeats,
        seconds=args.seconds,
        batch=args.batch,
        latents=args.latents,
        pictures=args.pictures,
        draws=tuple(args.draws),
        steps_measured=args.steps_measured,
        full=args.full,
        isa=None if args.isa is None else tuple(args.isa),
        kernels=args.kernels,
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
        from dsdiff.benchmark.modes import execute
        from ldm.fileio import check_writable

        check_writable(options.outdir)
        execute(options)


if __name__ == "__main__":
    main()
