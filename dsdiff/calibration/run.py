"""Run a calibration: collect data, learn unit by unit, write the file and the report of all units."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tomesd
from dsdiff.calibration.bars import PhaseBars
from dsdiff.calibration.data import DataPlan, calibration_data, plan_data
from dsdiff.calibration.estimate import check_estimate, duration, size
from dsdiff.calibration.kept import Measurement, measured_with
from dsdiff.calibration.needs import Measured, Workload, covers, measure, needs
from dsdiff.calibration.options import CalibrationOptions
from dsdiff.calibration.report import describe, describe_mixing, summary, write_report
from dsdiff.calibration.usage import Usage
from dsdiff.environment import choose_device, precision_context, versions
from dsdiff.models.lora import SOURCE_ENTRY, lora_facts
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.options import MergeOptions
from dsdiff.pipeline import Pipeline
from ldm.fileio import check_writable
from qdiff import calibrate as procedure
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.checkpoint import fingerprint, save_cali_ckpt
from qdiff.config import MixConfig, QuantConfig, ReconConfig
from qdiff.distributed import barrier, only_work_in, rank, restarted, sum_over_ranks, world_size
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import UnitReport
from qdiff.resume import ProgressFolder

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
# What the bar of a phase counts: layers, samples captured and iterations, or samples.
COUNTED = {"fitting": "layer", "weights": "it", "mixing": "sample", "ranges": "sample", "activations": "it"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the result depends on. A calibration can be resumed only with the same settings.

    fingerprint: of the float UNet's weights, with the LoRAs `lora` merged into them (None: none). data_sha256: of the
    calibration data. samples: how many it has.
    processes: how many of torchrun share the work, in which sums are made in another order.
    """

    fingerprint: str
    lora: list[dict[str, Any]] | None
    config: QuantConfig
    mix: MixConfig | None
    recon: ReconConfig | None
    quant_mode: str
    running_stat: bool
    merge: MergeOptions | None
    data_sha256: str
    samples: int
    batch_size: int
    seed: int
    processes: int


def calibrate(options: CalibrationOptions) -> Path:
    """Calibrate a model; return the file written, which QuantizationOptions(cali_ckpt=...) draws with.

    In options.outdir there are afterwards that file, report.json with the errors of each unit before and after, and the
    calibration data. Under torchrun all processes call this, and share the work; restarted ones go on with it.
    Raises ValueError or OSError for what cannot work, such as an unfinished calibration in the folder that is not to be
    resumed. A KeyboardInterrupt leaves finished units there, and its text tells how to go on.
    """
    progress = ProgressFolder(options.outdir / "progress")
    if options.resume and not progress.begun and options.target.exists():
        raise ValueError(f"{str(options.target)!r} is finished: leave out --resume to calibrate anew in its place")
    check_begun(progress, progress.begun, restarted() or options.resume)
    spec = find_model(options.model, accept_bundle=False)
    logger.info("%s", spec)
    check_writable(options.outdir)
    if options.target.exists():
        logger.warning("%s of an earlier calibration will be replaced at the end of this one", options.target)
    with only_work_in(options.outdir):
        _calibrate(spec, options, progress)
    return options.target


def _calibrate(spec: ModelSpec, options: CalibrationOptions, progress: ProgressFolder) -> None:
    cache = Cache(options.cache_bytes, options.outdir / "cache")
    cache.sweep()
    pipeline = Pipeline(spec, device=options.device, tokenizer=options.model.tokenizer, lora=options.lora)
    plan = plan_data(pipeline, options)
    barrier()  # all have looked for the data
    qnn = _quantized(pipeline, options)
    work = _workload(options, progress)
    if progress.begun and plan.ready is not None:
        progress.check(asdict(_settings(qnn, plan.ready, options)))  # other settings are told at once
    measurement = Measurement(folder=progress, facts=measured_with(spec, qnn, plan, work, options))
    measured = _check_needs(qnn, plan, work, options, measurement)
    with Usage(options.outdir, cache) as usage:
        qnn, data = _with_data(pipeline, qnn, plan, options)
        del pipeline  # the model around the UNet is let go
        # Float targets are computed in whole float32, and with the same tokens merged as what is compared with them.
        with _merged_alike(qnn, options.merge), precision_context(choose_device(options.device), "full"):
            settings = _settings(qnn, data, options)
            begin_or_resume(progress, asdict(settings), restarted() or options.resume)
            if rank() == 0:
                measurement.write(measured)
            reports = _learn(qnn, data, options, progress, cache, usage)
        barrier()  # all have read what is removed now
        if rank() == 0:
            _write(qnn, settings, reports, spec, data, options)
            usage.look()
            progress.remove()
    for line in summary(reports):
        logger.info("%s", line)
    memory = torch.tensor([usage.memory])  # of each process, as the estimate counts all of them
    sum_over_ranks([memory])
    if rank() == 0:
        taken = (duration(usage.seconds), size(int(memory)), size(usage.disk))
        logger.info("took %s, %s more memory, and %s of disk at most", *taken)
        logger.info("written to %s (%.2f MB)", options.target, options.target.stat().st_size / 1e6)


def ready_made(folder: Path, options: CalibrationOptions) -> Path:
    """Return the file that these options make in `folder`. It is made if missing, or resumed if it was begun.

    Under torchrun all processes call this.
    """
    begun = ProgressFolder(folder / "progress").begun
    own = replace(options, outdir=folder, resume=begun)
    there = own.target.exists()
    barrier()  # all have looked
    if not there:
        logger.info("calibrating in %s", folder)
        calibrate(own)
        barrier()  # it is written
    return own.target


# --- preparations ------------------------------------------------------------------------------------------


def _with_data(
    pipeline: Pipeline, qnn: QuantModel, plan: DataPlan, options: CalibrationOptions
) -> tuple[QuantModel, CalibrationSet]:
    """Return the quantized UNet, not calibrated yet, and its data, which the float UNet draws if it is not there."""
    if plan.ready is not None:
        return qnn, plan.ready
    if options.merge is not None:
        tomesd.remove_patch(qnn)
    qnn.restore()
    data = calibration_data(pipeline, options)
    return _quantized(pipeline, options), data


def _quantized(pipeline: Pipeline, options: CalibrationOptions) -> QuantModel:
    """Return the pipeline's UNet, quantized, with merged tokens if they are asked for."""
    qnn = QuantModel(pipeline.model.model.diffusion_model, options.quant_config())
    if options.merge is not None:
        tomesd.apply_patch(qnn, **asdict(options.merge))
    return qnn


@contextmanager
def _merged_alike(qnn: QuantModel, merge: MergeOptions | None) -> Iterator[None]:
    """Merge the same tokens in all forward passes within the block, if tokens are merged at all."""
    if merge is None:
        yield
    else:
        with tomesd.pinned(qnn, merge.seed):
            yield


def _workload(options: CalibrationOptions, progress: ProgressFolder) -> Workload:
    return Workload(
        recon=options.recon_config(),
        mix=options.mix_config(),
        batch_size=options.effort.batch_size,
        cache=options.cache_bytes,
        format=options.format,
        finished=progress.finished() if progress.begun else 0,
    )


def _check_needs(
    qnn: QuantModel, plan: DataPlan, work: Workload, options: CalibrationOptions, kept: Measurement
) -> Measured:
    """Tell what the calibration needs before any of it is done; return what was measured for it, now or earlier.

    Raises ValueError for what is not there.
    """
    device = choose_device(options.device)
    measured = kept.read(lambda found: covers(found, qnn, plan, work))
    if measured is None:
        logger.info("measuring the model, to tell what this takes")
        with _merged_alike(qnn, options.merge), precision_context(device, "full"):
            measured = measure(qnn, plan, work)
    check_estimate(needs(qnn, plan, work, measured), options.outdir, device)
    return measured


def _settings(qnn: QuantModel, data: CalibrationSet, options: CalibrationOptions) -> Settings:
    digest = hashlib.sha256()
    for tensor in (data.x, data.t, data.context):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().data)
    return Settings(
        fingerprint=fingerprint(qnn),
        lora=lora_facts(options.lora) or None,
        config=qnn.config,
        mix=options.mix_config(),
        recon=options.recon_config(),
        quant_mode=options.quant_mode,
        running_stat=options.running_stat,
        merge=options.merge,
        data_sha256=digest.hexdigest(),
        samples=len(data),
        batch_size=options.effort.batch_size,
        seed=options.seed,
        processes=world_size(),
    )


def check_begun(folder: ProgressFolder, begun: bool, resume: bool) -> None:
    """Raise ValueError for a calibration that was begun in the folder and is not to be gone on with."""
    if begun and not resume:
        raise ValueError(
            f"{str(folder.folder)!r} holds an unfinished calibration: go on with --resume, or remove it or use another "
            "--outdir to begin anew"
        )


def begin_or_resume(folder: ProgressFolder, settings: Mapping[str, Any], resume: bool) -> None:
    """Begin a calibration, or make sure that the one begun has the same settings. All processes call this.

    Raises ValueError rather than lose unfinished work.
    """
    begun = folder.begun
    barrier()  # no process may find what another has just begun
    check_begun(folder, begun, resume)
    if begun:
        folder.check(settings)
    elif rank() == 0:
        folder.begin(settings)
    barrier()


# --- learning ----------------------------------------------------------------------------------------------


def _learn(
    qnn: QuantModel,
    data: CalibrationSet,
    options: CalibrationOptions,
    folder: ProgressFolder,
    cache: Cache,
    usage: Usage,
) -> list[UnitReport]:
    """Calibrate behind a bar for each phase; return the reports of all units."""
    recon, mix = options.recon_config(), options.mix_config()
    steps = procedure.calibration_steps(qnn, recon, mix)
    layers = len(qnn.layers())
    work = [(step, procedure.step_work(step, recon, len(data), mix, layers=layers)) for step in steps]
    counted = {**COUNTED, **({"weights": "unit"} if recon is not None and recon.rounding == "gptq" else {})}
    bars = PhaseBars(work, folder.finished(), counted, shown=rank() == 0)
    reports: list[UnitReport] = []
    steps = procedure.calibrate(
        qnn,
        data,
        recon,
        cache=cache,
        mix=mix,
        batch_size=options.effort.batch_size,
        running=options.running_stat,
        seed=options.seed,
        folder=folder,
        progress=bars.advance,
    )
    try:
        with bars:
            for step, report in steps:
                usage.look()
                if step.unit:
                    reports.append(UnitReport(**report))
                    logger.debug("%s", describe(reports[-1]))
                elif step.phase == "mixing" and mix is not None:
                    logger.info("%s", describe_mixing(report["shares"], mix.bits))
    except KeyboardInterrupt:
        way_on = (
            f"{folder.finished()} of {len(work)} steps done in {options.outdir}; the same command with --resume goes on"
        )
        raise KeyboardInterrupt(way_on) from None
    except ValueError as error:
        kept = (
            f"{folder.finished()} of {len(work)} steps are kept in {str(folder.folder)!r}, from which --resume goes on"
        )
        raise ValueError(f"{error}; {kept} with the same settings; remove it for others") from error
    finally:
        cache.clear()
    return reports


# --- the files ---------------------------------------------------------------------------------------------


def _write(
    qnn: QuantModel,
    settings: Settings,
    reports: Sequence[UnitReport],
    spec: ModelSpec,
    data: CalibrationSet,
    options: CalibrationOptions,
) -> None:
    """Write the calibrated numbers, and the report."""
    facts = {
        **asdict(settings),
        "rounding": "nearest" if settings.recon is None else settings.recon.rounding,
        "preset": options.preset,
        "data": data.facts,
        "versions": versions(),
    }
    source: dict[str, Any] = {"ckpt": spec.ckpt.name, "config": spec.config_path.name, **spec.hashes}
    if settings.lora:
        source[SOURCE_ENTRY] = settings.lora
    with tqdm(total=2, desc="writing", unit="file") as bar:
        save_cali_ckpt(
            qnn, options.target, format=options.format, merge=facts["merge"], calibration=facts, source=source
        )
        bar.update(1)
        write_report(options.outdir / REPORT_FILE, facts, reports)
        bar.update(1)
