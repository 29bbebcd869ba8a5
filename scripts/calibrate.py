#!/usr/bin/env python
"""Makes a cali_ckpt, few-bit weights and activations: python scripts/calibrate.py --quant_act --split --cond

Draws pictures of a list of prompts with the float model, keeps what its UNet is given on the way, and teaches the
quantized UNet to give the same, unit by unit: first the rounding of all weights (AdaRound), then the ranges of all
activations, then their step sizes (LSQ). Writes OUTDIR/cali.safetensors, which scripts/txt2img.py --ptq --cali_ckpt
draws with, and OUTDIR/report.json, the error of each unit before and after. What was finished is kept: an interrupted
calibration goes on with --resume, and ends with the same file.

--preset says how much: `fast` takes minutes on a CPU for the embedded model, `paper` has Q-Diffusion's numbers. Flags
override it. --quant_mode linear learns nothing: weights are rounded to nearest, ranges are minimum and maximum.

With torchrun the processes share the work: torchrun --nproc_per_node 2 scripts/calibrate.py ...
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

import tomesd
from dsdiff.calibration.data import calibration_data
from dsdiff.calibration.estimate import GIB, check_estimate, estimate
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.cli.flags import (
    add_bit_arguments,
    add_model_arguments,
    add_sampler_arguments,
    add_tome_arguments,
    given_flags,
    merge_options,
)
from dsdiff.cli.launch import own_device, processes
from dsdiff.pipeline import choose_model, precision_context, sampling_options, versions
from ldm.fileio import check_writable, write_atomically
from ldm.util import load_model_from_config
from qdiff.calibrate import Step, calibrate, steps_of, work_of
from qdiff.calibration_set import Cache, CalibrationSet
from qdiff.checkpoint import fingerprint, save_cali_ckpt
from qdiff.config import QuantConfig, ReconConfig
from qdiff.distributed import barrier, rank, world_size
from qdiff.quant_model import QuantModel
from qdiff.resume import ProgressFolder

PRESETS = {
    "fast": dict(cali_st=10, cali_n=12, iters_w=300, iters_a=100, batch_size=16, lr_w=3e-2, lr=2e-3),
    "paper": dict(cali_st=25, cali_n=128, iters_w=20000, iters_a=5000, batch_size=8, lr_w=1e-3, lr=4e-4),
}
# Flags of ReconConfig, which --quant_mode linear gives no meaning.
ROUNDING = ("lr_w", "weight", "b_start", "b_end", "warmup")
LEARNING = ("iters_w", "iters_a", *ROUNDING, "lr", "p", "sym", "no_grad_ckpt", "cache_gb")
SAMPLING = ("ddim_steps", "ddim_eta", "scale", "negative_prompt", "precision", "tokenizer")
# Flags that a ready file gives no meaning; of Q-Diffusion's, steps and samples are chosen.
COLLECTION = {True: ("prompts", "cond", "cali_st", "cali_n", *SAMPLING), False: ("prompts", "cond", *SAMPLING)}


# --- the command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_quantization_flags(parser)
    add_data_flags(parser)
    add_learning_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--outdir", type=Path, default=Path("outputs/calibration"), metavar="DIR", help="default: %(default)s")
    add("--resume", action="store_true", help="go on with the interrupted calibration in --outdir, of the same flags")
    add("--format", choices=["dsdiff", "qdiff"], default="dsdiff", help="of the cali_ckpt; qdiff is Q-Diffusion's .pth")
    add(
        "--cache_gb",
        type=number(float, 0),
        metavar="GB",
        help="activations kept in memory, the rest on disk",
    )
    add("--seed", type=number(int, 0, 2**31 - 1), default=42, metavar="N", help="default: %(default)s")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    add_model_arguments(parser)
    add_sampler_arguments(parser)
    add_tome_arguments(parser)
    args = parser.parse_args(argv)
    refuse_idle_flags(args)
    args.cache_gb = 2.0 if args.cache_gb is None else args.cache_gb
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    add_bit_arguments(group)
    parser.set_defaults(weight_bit=4, quant_act=False)
    group.add_argument(
        "--quant_mode",
        choices=["qdiff", "linear"],
        default="qdiff",
        help="qdiff learns; linear, the baseline, rounds to nearest between minimum and maximum (default: %(default)s)",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration data").add_argument
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: cali_prompts.txt beside the config)")
    add("--data_path", type=Path, metavar="FILE", help="ready data, of an earlier run or in Q-Diffusion's layout")
    add("--cali_st", type=number(int, 1), metavar="N", help="timesteps, spread over the trajectory")
    add("--cali_n", type=number(int, 1), metavar="N", help="pictures at each timestep")
    add(
        "--cond",
        action="store_true",
        default=None,
        help="both branches of guidance: with prompt and without",
    )
    add(
        "--num_samples",
        type=number(int, 1),
        metavar="N",
        help="take so many of all samples, at random (default: all)",
    )


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning (defaults: those of --preset, then Q-Diffusion's)").add_argument
    add("--preset", choices=list(PRESETS), default="fast", help="default: %(default)s")
    add("--batch_size", type=number(int, 1), metavar="N", help="samples a step, over all processes")
    add("--iters_w", type=number(int, 0), metavar="N", help="steps of AdaRound, a unit; 0 rounds to nearest")
    add(
        "--iters_a",
        type=number(int, 0),
        metavar="N",
        help="steps of LSQ, a unit; 0 leaves ranges as fitted",
    )
    add("--lr_w", type=number(float, 0), metavar="X", help="learning rate of AdaRound")
    add("--lr", type=number(float, 0), metavar="X", help="learning rate of LSQ, on the logarithm of step sizes")
    add("--p", type=number(float, 1), metavar="X", help="norm of LSQ's loss (default: 2.4)")
    add("--weight", type=number(float, 0), metavar="X", help="of the rounding regulariser (default: 0.01)")
    add("--b_start", type=number(float, 1), metavar="X", help="its exponent at first (default: 20)")
    add("--b_end", type=number(float, 1), metavar="X", help="its exponent at last (default: 2)")
    add("--warmup", type=number(float, 0, 1), metavar="X", help="share of the steps without it (default: 0.2)")
    add(
        "--sym",
        action="store_true",
        default=None,
        help="feed units the float model's inputs",
    )
    add("--no_grad_ckpt", action="store_true", default=None, help="no gradient checkpointing: faster, more memory")
    add("--running_stat", action="store_true", help="ranges by running averages of minimum and maximum")


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that would have no effect."""

    def refuse(names: Sequence[str], why: str) -> None:
        given = given_flags(args, names)
        if given:
            raise ValueError(f"{why}, so {', '.join(f'--{name}' for name in given)} has no effect: leave it out")

    if args.quant_mode == "linear":
        refuse(LEARNING, "--quant_mode linear learns nothing")
    if args.data_path is not None:
        refuse(COLLECTION[args.data_path.suffix == ".safetensors"], "with --data_path nothing is drawn")
        if args.plms or args.dpm_solver:
            raise ValueError("with --data_path nothing is drawn, so a sampler has no effect: leave it out")
    if args.iters_w == 0:
        refuse(ROUNDING, "with --iters_w 0 weights are rounded to nearest")
    if args.iters_a == 0:
        refuse(("lr", "p"), "with --iters_a 0 no step size is learned")
    if not args.quant_act:
        refuse(("act_bit", "sm_abit", "iters_a", "lr", "p"), "without --quant_act activations stay float")
        if args.running_stat:
            raise ValueError(
                "without --quant_act activations stay float, so --running_stat has no effect: leave it out"
            )


def quant_config(args: argparse.Namespace) -> QuantConfig:
    """What the flags say. Learning starts from ranges of least error; the baseline has minimum and maximum."""
    method = "max" if args.quant_mode == "linear" else "mse"
    bits = given_flags(args, ("act_bit", "sm_abit"))
    return QuantConfig(
        weight_bit=args.weight_bit,
        quant_act=args.quant_act,
        split=bool(args.split),
        scale_method=method,
        act_scale_method=method,
        **bits,
    )


def recon_config(args: argparse.Namespace) -> ReconConfig | None:
    """How units are learned; None for the baseline."""
    if args.quant_mode == "linear":
        return None
    names = ("iters_w", "iters_a", "batch_size", "lr_w", "lr", "p", "weight", "b_start", "b_end", "warmup", "sym")
    return ReconConfig(seed=args.seed, grad_checkpoint=not args.no_grad_ckpt, **given_flags(args, names))


# --- the run -----------------------------------------------------------------------------------------------


def settings_of(
    args: argparse.Namespace, qnn: QuantModel, recon: ReconConfig | None, data: CalibrationSet
) -> dict[str, Any]:
    """All that the result depends on, as plain values."""
    merge = merge_options(args)
    digest = hashlib.sha256()
    for tensor in (data.x, data.t, data.context):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy())
    return {
        "fingerprint": fingerprint(qnn),
        "config": qnn.config.to_dict(),
        "recon": recon.to_dict() if recon else None,
        "quant_mode": args.quant_mode,
        "running_stat": args.running_stat,
        "merge": asdict(merge) if merge else None,
        "data_sha256": digest.hexdigest(),
        "samples": len(data),
        "batch_size": args.batch_size,
        "seed": args.seed,
        "processes": world_size(),
    }


def prepare_progress(folder: ProgressFolder, settings: Mapping[str, Any], resume: bool) -> None:
    """Begin, or make sure that what was begun is the same. Raises ValueError rather than lose unfinished work."""
    begun = folder.begun
    barrier()  # no process may find what another has just begun
    if begun and not resume:
        raise ValueError(
            f"{str(folder.folder)!r} holds an unfinished calibration: go on with --resume, or remove it or use another "
            "--outdir to begin anew"
        )
    if begun:
        folder.check(settings)
    elif rank() == 0:
        folder.begin(settings)
    barrier()


def run_steps(
    qnn: QuantModel,
    data: CalibrationSet,
    recon: ReconConfig | None,
    args: argparse.Namespace,
    folder: ProgressFolder,
    cache: Cache,
) -> list[dict[str, Any]]:
    """Calibrate behind a bar of samples and iterations; the reports of all units."""
    steps, finished = steps_of(qnn, recon), folder.finished()
    work = [work_of(step, recon, len(data)) for step in steps]
    bar = tqdm(total=sum(work), initial=sum(work[:finished]), desc="calibration", unit="it", disable=rank() != 0)
    reports: list[dict[str, Any]] = []

    def advance(step: Step, n: int) -> None:
        bar.set_postfix_str(f"{step.phase} {step.unit.removeprefix('model.')}", refresh=False)
        bar.update(n)

    options = {"cache": cache, "batch_size": args.batch_size, "running": args.running_stat, "seed": args.seed}
    try:
        with bar:
            for step, report in calibrate(qnn, data, recon, folder=folder, progress=advance, **options):
                if step.unit:
                    reports.append(report)
                    logger.debug("%s", describe(report))
    except KeyboardInterrupt:
        way_on = f"{len(reports)} units finished in {args.outdir}; the same command with --resume goes on"
        raise KeyboardInterrupt(way_on) from None
    finally:
        cache.clear()
    return reports


def describe(report: Mapping[str, Any]) -> str:
    """A report in a line."""
    verdict = "" if report["improved"] else " (kept as it was)"
    return (
        f"{report['phase']:<11} {report['unit'].removeprefix('model.'):<45} "
        f"{report['before']:.3e} -> {report['after']:.3e}{verdict} {report['seconds']:.1f} s"
    )


def summary(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a phase: by how much the errors fell."""
    for phase in ("weights", "activations"):
        rows = [report for report in reports if report["phase"] == phase]
        if rows:
            ratios = sorted(row["after"] / row["before"] if row["before"] else 1.0 for row in rows)
            seconds = sum(row["seconds"] for row in rows)
            yield (
                f"{phase}: {sum(row['improved'] for row in rows)} of {len(rows)} units improved, error x "
                f"{ratios[len(ratios) // 2]:.2f} (median), {seconds:.0f} s"
            )


def run(args: argparse.Namespace) -> None:
    choice = choose_model(args)
    logger.info("%s", choice)
    config, recon, merge = quant_config(args), recon_config(args), merge_options(args)
    suffix = ".pth" if args.format == "qdiff" else ".safetensors"
    target = args.outdir / f"cali{suffix}"
    check_writable(args.outdir)
    device = own_device(args.device)
    model = load_model_from_config(choice.config, choice.ckpt, device, tokenizer=args.tokenizer, verbose=args.verbose)
    data = calibration_data(args, choice, replace(sampling_options(args, choice), merge=None), model)
    qnn = QuantModel(model.model.diffusion_model, config)
    model.model.diffusion_model = qnn
    if merge is not None:
        tomesd.apply_patch(qnn, **asdict(merge))
    cache = Cache(int(args.cache_gb * GIB), args.outdir / "cache")
    cache.clear()
    progress = ProgressFolder(args.outdir / "progress")
    # What is given and what is wanted are merged alike, and convolutions of float targets are float32.
    pinned = tomesd.pinned(qnn, merge.seed) if merge is not None else nullcontext()
    with pinned, precision_context(device, "full"):
        check_estimate(estimate(qnn, data, recon, args.batch_size, cache.limit), cache.limit, args.outdir, device)
        settings = settings_of(args, qnn, recon, data)
        prepare_progress(progress, settings, args.resume)
        reports = run_steps(qnn, data, recon, args, progress, cache)
    barrier()  # all have read what is removed now
    if rank() == 0:
        facts = {**settings, "preset": args.preset, "data": data.facts, "versions": versions()}
        source = {"ckpt": choice.ckpt.name, "config": choice.config_path.name, **choice.hashes}
        save_cali_ckpt(qnn, target, format=args.format, merge=settings["merge"], calibration=facts, source=source)
        content = json.dumps({"settings": facts, "units": reports}, indent=2)
        write_atomically(args.outdir / "report.json", lambda path: path.write_text(content + "\n", encoding="utf-8"))
        progress.remove()
    for line in summary(reports):
        logger.info("%s", line)
    if rank() == 0:
        logger.info("written to %s (%.2f MB)", target, target.stat().st_size / 1e6)


def ready_made(folder: Path, flags: Sequence[str]) -> Path:
    """The file that these flags make in `folder`: made if it is not there, gone on with if it was begun.

    For other commands; under torchrun all processes call it.
    """
    path = folder / "cali.safetensors"
    there, begun = path.exists(), ProgressFolder(folder / "progress").begun
    barrier()  # all have looked
    if not there:
        logger.info("calibrating in %s", folder)
        run(parse_args([*flags, "--outdir", str(folder), *(["--resume"] if begun else [])]))
        barrier()  # it is written
    return path


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose), processes():
        run(args)


if __name__ == "__main__":
    main()
