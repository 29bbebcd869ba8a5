"""Calibrate a whole model: ranges and roundings of weights, then ranges and step sizes of activations."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache, Progress
from qdiff.config import MixConfig, ReconConfig
from qdiff.distributed import barrier, rank
from qdiff.finite import named
from qdiff.observers import fit_activations
from qdiff.quant_model import QuantModel
from qdiff.quant_state import (
    activation_tensors,
    load_tensors,
    load_weight_ranges,
    weight_range_tensors,
    weight_tensors,
)
from qdiff.reconstruction import UnitReport, step_sizes, unit_reconstruction
from qdiff.resume import ProgressFolder
from qdiff.rounding_pass import round_units
from qdiff.sensitivity import mix_activations

# What is saved of a finished step: the tensors that it has changed, of a unit or of the whole model.
SAVED: Mapping[str, Callable[[QuantModel, str], dict[str, Tensor]]] = {
    "fitting": weight_range_tensors,
    "weights": weight_tensors,
    "mixing": activation_tensors,
    "ranges": activation_tensors,
    "activations": activation_tensors,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a calibration.

    phase: "fitting" (the ranges of weights), "weights", "mixing" (which inputs get more bits), "ranges" (those of
    activations) or "activations". unit: the unit's name; empty for fitting, mixing and ranges, which are done for the
    whole model at once.
    """

    phase: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.phase}, {self.unit.removeprefix('model.')}" if self.unit else self.phase


def calibration_steps(qnn: QuantModel, recon: ReconConfig | None, mix: MixConfig | None = None) -> list[Step]:
    """Return the steps of a calibration, in order. Without `recon`, or with 0 iterations, nothing is learned.

    Without `mix` all inputs have the same bits. Units all of whose ranges are dynamic have no step sizes to learn.
    """
    units = list(qnn.units())
    rounds = recon is not None and (recon.rounding == "gptq" or (recon.rounding == "adaround" and recon.iters_w > 0))
    steps = [Step(phase="fitting"), *(Step(phase="weights", unit=unit) for unit in units if rounds)]
    if qnn.config.quant_act:
        steps += [Step(phase="mixing")] if mix else []
        steps.append(Step(phase="ranges"))
        if recon and recon.iters_a:
            steps += [Step(phase="activations", unit=name) for name, unit in qnn.units().items() if step_sizes(unit)]
    return steps


def step_work(step: Step, recon: ReconConfig | None, samples: int, mix: MixConfig | None = None, *, layers: int) -> int:
    """Return the total that `calibrate` reports to `progress` for a step.

    It is the model's layers for fitting; 1 for GPTQ; samples for mixing and ranges; and samples captured, plus
    iterations, where a unit learns.
    """
    if step.phase == "fitting":
        return layers
    if step.phase == "mixing" and mix is not None:
        return 2 * min(mix.samples, samples)
    if step.phase == "ranges" or recon is None:
        return samples
    if step.phase == "activations":
        return 2 * samples + recon.iters_a
    if recon.rounding == "gptq":
        return 1
    return 2 * samples + recon.iters_w


def calibrate(
    qnn: QuantModel,
    data: CalibrationSet,
    recon: ReconConfig | None,
    *,
    cache: Cache,
    mix: MixConfig | None = None,
    batch_size: int = 8,
    running: bool = False,
    seed: int = 0,
    folder: ProgressFolder | None = None,
    progress: Callable[[Step, int], object] = lambda step, done: None,
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Calibrate a model in place, yielding each finished step with its report.

    recon: how weights are rounded and units learned; None rounds to nearest and fits ranges, and learns nothing.
    mix: which inputs get more bits than act_bit; None for none. The config's `mixed_act` holds them afterwards.
    batch_size: samples per forward pass (but GPTQ's, see `round_units`). cache: storage of captured activations.
    running: see `fit_activations`.
    folder: where finished steps are kept; steps that are there already are loaded. progress(step, n) is called when n
    more iterations or samples are done, see `step_work`. Afterwards all weights are frozen and all quantizers are on.
    Raises ValueError, with phase and unit, where a number becomes NaN or infinite; finished steps are kept.
    """
    qnn.requires_grad_(False)
    resuming = folder is not None
    rounded: dict[str, dict[str, Any]] = {}  # the reports of units whose weights were rounded and saved in GPTQ's pass
    for number, step in enumerate(calibration_steps(qnn, recon, mix)):
        if step.phase in ("mixing", "ranges"):
            qnn.freeze()
        saved = folder.load(number) if folder is not None and resuming else None
        if saved is not None:
            tensors, report = saved
            _restore(qnn, step, tensors, report, mix)
            yield step, report
            continue
        if resuming and folder is not None:
            barrier()  # all have looked: none may find, and load, what another has just finished
            if rank() == 0:
                folder.drop_from(number)
        resuming = False
        if step.phase == "weights" and recon is not None and recon.rounding == "gptq":
            if not rounded:
                with named("weights"):
                    rounded = _round_by_gptq(qnn, data, recon, number, folder, progress)
            report = rounded[step.unit]
        else:
            options = {"cache": cache, "batch_size": batch_size, "running": running, "seed": seed}
            with named(str(step)):
                report = _do(qnn, step, data, recon, mix, **options, progress=partial(progress, step))
            _save(folder, number, qnn, step, report)
        barrier()
        yield step, report
    qnn.freeze()
    qnn.set_quant_state(True, qnn.config.quant_act)


def _do(
    qnn: QuantModel,
    step: Step,
    data: CalibrationSet,
    recon: ReconConfig | None,
    mix: MixConfig | None,
    *,
    cache: Cache,
    batch_size: int,
    running: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Do a step, but for those of GPTQ, which has one pass for all units; return the step's report."""
    report: dict[str, Any] = {"phase": step.phase, "unit": step.unit}
    if step.phase == "fitting":
        fit_weights(qnn, progress)
    elif step.phase == "mixing" and mix is not None:
        report["shares"] = mix_activations(qnn, data, mix, batch_size, running=running, progress=progress)
    elif step.phase == "ranges" or recon is None:
        fit_activations(qnn, data, batch_size, running=running, seed=seed, progress=progress)
    else:
        options = {"batch_size": batch_size, "cache": cache, "progress": progress}
        report = unit_reconstruction(qnn, step.unit, data, recon, phase=step.phase, **options).to_dict()
    return report


def fit_weights(qnn: QuantModel, progress: Progress = lambda layers: None) -> None:
    """Fit the ranges of all weights that have none yet; progress(1) is called after each layer.

    Raises ValueError, with the layer's name, for a range that is NaN or infinite.
    """
    for name, layer in qnn.layers().items():
        if not all(getattr(layer, part).is_set for part in layer.weight_parts()):
            with named(name.removeprefix("model.")):
                layer.fit_weight()
        progress(1)


def _round_by_gptq(
    qnn: QuantModel,
    data: CalibrationSet,
    recon: ReconConfig,
    number: int,
    folder: ProgressFolder | None,
    progress: Callable[[Step, int], object],
) -> dict[str, dict[str, Any]]:
    """Round the weights of the units from step `number` on, saving each in `folder`; return their reports.

    Step 0 is the fitting, and step 1 that of the first unit.
    """
    reports: dict[str, dict[str, Any]] = {}

    def on_unit(report: UnitReport) -> None:
        reports[report.unit] = report.to_dict()
        step = Step(phase="weights", unit=report.unit)
        _save(folder, number + len(reports) - 1, qnn, step, reports[report.unit])
        progress(step, 1)

    round_units(qnn, data, recon, finished=number - 1, on_unit=on_unit)
    return reports


def _save(folder: ProgressFolder | None, number: int, qnn: QuantModel, step: Step, report: dict[str, Any]) -> None:
    """Keep a finished step, with the tensors that it has changed."""
    if folder is not None and rank() == 0:
        folder.save(number, SAVED[step.phase](qnn, step.unit), report)


def _restore(
    qnn: QuantModel, step: Step, tensors: dict[str, Tensor], report: dict[str, Any], mix: MixConfig | None
) -> None:
    """Put the model into the state after a step whose tensors and report were saved."""
    if step.phase == "fitting":
        load_weight_ranges(qnn, tensors)
        return
    if step.phase == "mixing" and mix is not None:
        qnn.mix_act(dict.fromkeys(report["shares"], mix.bits))
    weights = step.phase == "weights"
    load_tensors(qnn, tensors, step.unit, weights=weights, acts=not weights)
