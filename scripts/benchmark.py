#!/usr/bin/env python
"""How fast is the UNet, and what does it need? python scripts/benchmark.py --repeats 5

Times single UNet calls as a guided step makes them (a batch of 2) at the model's latent size, by each --engine with
each --ratio of merged tokens:

  float32, bf16       the float UNet, all of it in that dtype
  simulate            quantized (W4A8), whole numbers held as floats
  int8                quantized, in integer kernels; the rest in bfloat16 where the hardware has it
  int8-float32        the same, the rest in float32

All settings are gone through in turn, --repeats times, forwards and backwards; each measurement begins with an untimed
call (if calls take more than 10 s, in the first repeat only). What is compared is compared within a repeat: speed-up is
the time of float32 without merging over the setting's, both of the same repeat. Tables show medians (min..max).
--peers adds what is installed of diffusers and OpenVINO, on the same UNet. --memory adds the peak of each engine, of a
process of its own.

Speed does not depend on what the weights are: --random_weights measures the real shapes of Stable Diffusion v1, or of
any --config, without a checkpoint. Prints tables and writes benchmark.json, benchmark.md and benchmark.png to OUTDIR.
"""

# ruff: noqa: E402
import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.benchmark import peers as benchmark_peers
from dsdiff.benchmark import variants as benchmark_engines
from dsdiff.benchmark.memory import peak_alone, tell_peak
from dsdiff.benchmark.operations import operations
from dsdiff.benchmark.peers import PEERS
from dsdiff.benchmark.report import markdown, plot, text
from dsdiff.benchmark.roofline import floor_seconds, peaks
from dsdiff.benchmark.source import MODELS, Source
from dsdiff.benchmark.timing import BASELINE, machine, measure, rows_of, settings_of
from dsdiff.benchmark.variants import DEFAULT, ENGINES, Engine, shipped_ranges
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.pipeline import choose_device
from ldm.fileio import check_writable, write_atomically
from qdiff.config import QuantConfig

# --- the command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=list(MODELS), help="(default: embedded)")
    which.add_argument("--config", type=Path, metavar="FILE", help="any model's yaml; needs --random_weights")
    add = parser.add_argument
    add("--random_weights", action="store_true", help="build the config's UNet without a checkpoint")
    add("--engine", nargs="+", choices=ENGINES, metavar="E", help=f"(default: those that run of {' '.join(DEFAULT)})")
    add("--peers", nargs="*", choices=PEERS, metavar="P", help=f"all that is installed, or some of {' '.join(PEERS)}")
    add("--ratio", type=number(float, 0, 1), nargs="+", default=[0.0, 0.3, 0.5], metavar="X", help="(default: 0 .3 .5)")
    add("--weight_bit", type=int, choices=(4, 8), default=4, help="of quantized engines (default: %(default)s)")
    add("--memory", action="store_true", help="measure peak memory, too: each engine is built twice")
    add("--repeats", type=number(int, 1), default=5, metavar="N", help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=number(int, 1), metavar="N", help="of the CPU (default: torch's choice)")
    add("--outdir", type=Path, default=Path("outputs/benchmark"), metavar="DIR", help="(default: %(default)s)")
    add("--verbose", action="store_true", help="show where an error comes from")
    add("--child", choices=(*ENGINES, *PEERS), help=argparse.SUPPRESS)  # tell the peak memory of one, nothing else
    args = parser.parse_args(argv)
    if args.config is not None and not args.random_weights:
        parser.error("--config FILE comes without a checkpoint: add --random_weights")
    if args.config is None and args.random_weights and args.model != "sd-v1":
        parser.error("--random_weights contradicts the embedded model, which has weights: leave it out")
    args.peers = PEERS if args.peers == [] else args.peers or ()
    return args


def set_threads(args: argparse.Namespace, device: torch.device) -> None:
    if args.threads is None:
        return
    if device.type == "cuda":
        raise ValueError(f"--threads {args.threads} has no effect on a GPU: leave it out or use --device cpu")
    torch.set_num_threads(args.threads)


# --- the run -----------------------------------------------------------------------------------------------


def benchmark(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The report, as it is written. argv: from which the args are."""
    device, config = choose_device(args.device), quant_config(args)
    set_threads(args, device)
    names, left_out = benchmark_engines.choose_engines(args.engine, config, device)
    source = source_of(args, device)
    peers, peers_left_out = benchmark_peers.choose_peers(args.peers, source)
    left_out |= peers_left_out
    for name, reason in left_out.items():
        logger.info("%s is left out: %s", name, reason)
    settings = settings_of(names, args.ratio, peers)
    names = list(dict.fromkeys(setting.engine for setting in settings))
    benchmark_peers.convert(names, source, args.outdir)
    peak = {name: peak_alone(name, argv) for name in names} if args.memory else {}
    engines = {name: build(name, source, config, args.outdir) for name in tqdm(names, "building", unit="engine")}
    rows = rows_of(measure(engines, settings, args.repeats, device))
    counted = [{"ratio": ratio, "operations": operations_of(engines, ratio)} for ratio in dict.fromkeys(args.ratio)]
    return {
        "model": model_facts(source, config),
        "machine": machine(device),
        "repeats": args.repeats,
        "steps": source.steps,
        "engines": {name: engine_facts(engine, peak.get(name)) for name, engine in engines.items()},
        "settings": rows,
        "operations": counted,
        "floor": floor(rows, counted, config, device),
        "left_out": left_out,
    }


def quant_config(args: argparse.Namespace) -> QuantConfig:
    return QuantConfig(weight_bit=args.weight_bit, act_bit=8, quant_act=True, split=True, sm_abit=16)


def source_of(args: argparse.Namespace, device: torch.device) -> Source:
    return Source.read(args.config or MODELS[args.model or "embedded"], args.random_weights, device)


def build(name: str, source: Source, config: QuantConfig, outdir: Path) -> Engine:
    if name in PEERS:
        return benchmark_peers.build(name, source, outdir)
    return benchmark_engines.build(name, source, config)


def operations_of(engines: Mapping[str, Engine], ratio: float) -> dict[str, int]:
    with engines[BASELINE.engine].running(ratio) as call:
        return operations(call)


def floor(
    rows: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]], config: QuantConfig, device: torch.device
) -> dict[str, Any] | None:
    """How far int8 is from the peak of its kernels; None where it was not measured, and on a GPU."""
    seconds = {row["ratio"]: row["seconds"]["median"] for row in rows if row["engine"] == "int8"}
    if not seconds or device.type != "cpu":
        return None
    peak = peaks(config, device)
    least = {of["ratio"]: floor_seconds(of["operations"], peak) for of in counted}
    ratios = [{"ratio": r, "seconds": least[r], "times": own / least[r]} for r, own in seconds.items()]
    return {"peaks": peak, "ratios": ratios}


def model_facts(source: Source, config: QuantConfig) -> dict[str, Any]:
    inputs, ranges = source.inputs(), shipped_ranges(source, config)
    return {
        "config": source.config.name,
        "random_weights": source.ckpt is None,
        "parameters": source.parameters(),
        "latents": list(inputs["x"].shape),
        "context": list(inputs["context"].shape),
        "bits": f"W{config.weight_bit}A{config.act_bit}",
        "ranges": "ranges fitted to noise" if ranges is None else f"ranges of {ranges.name}",
    }


def engine_facts(engine: Engine, peak: int | None) -> dict[str, Any]:
    return {"weight_bytes": engine.weight_bytes, "peak_bytes": peak, "precision": engine.precision}


def write(report: Mapping[str, Any], outdir: Path) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    for name, content in (("benchmark.json", json.dumps(report, indent=2) + "\n"), ("benchmark.md", markdown(report))):
        write_atomically(outdir / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    write_atomically(outdir / "benchmark.png", lambda path: plot(report, path))


@command
def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    if args.child:
        device = choose_device(args.device)
        set_threads(args, device)
        tell_peak(build(args.child, source_of(args, device), quant_config(args), args.outdir))
        return
    with logs(args.verbose):
        check_writable(args.outdir)
        report = benchmark(args, argv)
        tqdm.write(text(report))
        write(report, args.outdir)


if __name__ == "__main__":
    main()
