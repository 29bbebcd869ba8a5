"""A whole benchmark: from options to a report."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm import tqdm

from dsdiff.benchmark import peers, roofline, variants
from dsdiff.benchmark.figures import (
    EngineFigures,
    Floor,
    FloorFigures,
    ModelFacts,
    OperationCount,
    Report,
    SettingFigures,
)
from dsdiff.benchmark.memory import peak_alone
from dsdiff.benchmark.operations import operations
from dsdiff.benchmark.options import PEERS, BenchmarkOptions
from dsdiff.benchmark.peers import Peer
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.timing import BASELINE, figures_of, measure, settings_of
from dsdiff.benchmark.variants import Engine
from dsdiff.environment import choose_device, machine
from qdiff.config import QuantConfig

logger = logging.getLogger(__name__)


def benchmark(options: BenchmarkOptions) -> Report:
    """Measure all that the options ask for.

    Raises ValueError or OSError for what cannot be measured. A peer that fails is left out, and the report says why.
    """
    device, config = choose_device(options.device), variants.quant_config(options.weight_bit)
    set_threads(options.threads, device)
    names, left_out = variants.choose_engines(options.engines, config, device)
    shape: dict[str, Any] = {"batch": options.batch, "latents": options.latents}
    source = Source.read(options.config_path, options.random_weights, device, **shape)
    chosen, missing = peers.choose_peers(options.peers, device)
    for name, reason in (left_out | missing).items():
        logger.info("%s is left out: %s", name, reason)
    left_out |= missing
    settings = settings_of(names, options.chosen_ratios, chosen)
    names = list(dict.fromkeys(setting.engine for setting in settings))
    with ExitStack() as stack:
        engines, peak = _build(names, source, options, left_out, stack)
        settings = [setting for setting in settings if setting.engine in engines]
        measured, failed = measure(engines, settings, options.repeats, seconds=options.seconds)
        _leave_out(failed, left_out)
        rows = figures_of(measured)
        counted = [_count(engines, ratio) for ratio in dict.fromkeys(options.chosen_ratios)]
    return Report(
        model=_model_facts(source, config),
        machine=machine(device),
        repeats=options.repeats,
        steps=source.steps,
        engines={name: _figures(engines[name], peak.get(name)) for name in engines if name not in failed},
        settings=rows,
        operations=counted,
        floor=_floor(rows, counted, config, device, seconds=2 * options.seconds),
        left_out=left_out,
    )


def set_threads(threads: int | None, device: torch.device) -> None:
    """Let torch use this many threads. Raises ValueError on a GPU, where it has no effect."""
    if threads is None:
        return
    if device.type == "cuda":
        raise ValueError(f"--threads {threads} has no effect on a GPU: leave it out or use --device cpu")
    torch.set_num_threads(threads)


# --- engines -----------------------------------------------------------------------------------------------


def _build(
    names: Sequence[str], source: Source, options: BenchmarkOptions, left_out: dict[str, str], stack: ExitStack
) -> tuple[dict[str, Engine | Peer], dict[str, int]]:
    """Build engines and peers; return them, and their peak memory if it is asked for.

    The processes of the peers end with `stack`. Peers that fail are put into `left_out`.
    """
    bits, outdir = options.weight_bit, options.outdir
    engines: dict[str, Engine | Peer] = {}
    peak: dict[str, int] = {}
    unconverted = peers.convert(names, source, outdir)
    _leave_out(unconverted, left_out)
    for name in tqdm([name for name in names if name not in unconverted], "building", unit="engine"):
        try:
            if options.memory:
                peak[name] = peak_alone(name, source, weight_bit=bits, outdir=outdir, seconds=options.seconds)
            if name in PEERS:
                engines[name] = peer = Peer(name, source, weight_bit=bits, outdir=outdir)
                stack.callback(peer.close)
        except WorkerError as error:
            if name not in PEERS:
                raise
            _leave_out({name: str(error)}, left_out)
        if name not in PEERS:
            engines[name] = variants.build(name, source, variants.quant_config(bits))
    return engines, peak


def _leave_out(failed: Mapping[str, str], left_out: dict[str, str]) -> None:
    """Note which peers failed, and tell it."""
    for name, reason in failed.items():
        logger.warning("%s is left out: %s", name, reason)
    left_out |= failed


# --- figures -----------------------------------------------------------------------------------------------


def _figures(engine: Engine | Peer, peak: int | None) -> EngineFigures:
    return EngineFigures(weight_bytes=engine.weight_bytes, peak_bytes=peak, precision=engine.precision)


def _count(engines: Mapping[str, Engine | Peer], ratio: float) -> OperationCount:
    """Count the operations of the float UNet at a merge ratio."""
    baseline = engines[BASELINE.engine]
    assert isinstance(baseline, Engine)
    with baseline.running(ratio) as call:
        return OperationCount(ratio=ratio, operations=operations(call))


def _floor(
    rows: Sequence[SettingFigures],
    counted: Sequence[OperationCount],
    config: QuantConfig,
    device: torch.device,
    *,
    seconds: float,
) -> Floor | None:
    """Compare int8 with the peak of its kernels; None where it was not measured, and on a GPU."""
    measured = {row.ratio: row.seconds.median for row in rows if row.engine == "int8"}
    if not measured or device.type != "cpu":
        return None
    peaks = roofline.peaks(config, device, seconds)
    least = {count.ratio: roofline.floor_seconds(count.operations, peaks) for count in counted}
    ratios = [FloorFigures(ratio=r, seconds=least[r], times=own / least[r]) for r, own in measured.items()]
    return Floor(peaks=peaks, ratios=ratios)


def _model_facts(source: Source, config: QuantConfig) -> ModelFacts:
    inputs, ranges = source.inputs(), variants.shipped_ranges(source, config)
    return ModelFacts(
        config=source.config.name,
        random_weights=source.ckpt is None,
        parameters=source.parameters(),
        latents=list(inputs["x"].shape),
        context=list(inputs["context"].shape),
        bits=f"W{config.weight_bit}A{config.act_bit}",
        ranges="ranges fitted to noise" if ranges is None else f"ranges of {ranges.name}",
    )
