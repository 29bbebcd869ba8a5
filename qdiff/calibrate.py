"""Calibrate a whole model: weights unit by unit, then the ranges of all activations, then step sizes unit by unit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.config import MixConfig, ReconConfig
from qdiff.distributed import barrier, rank
from qdiff.observers import fit_activations
from qdiff.quant_model import QuantModel
from qdiff.quant_state import activation_tensors, load_tensors, weight_tensors
from qdiff.reconstruction import unit_reconstruction
from qdiff.resume import ProgressFolder
from qdiff.sensitivity import mix_activations


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a calibration.

    phase: "weights", "mixing" (which inputs get more bits), "ranges" or "activations". unit: the unit's name; empty for
    mixing and ranges, which are done for the whole model at once.
    """

    phase: str
    unit: str = ""


def calibration_steps(qnn: QuantModel, recon: ReconConfig | None, mix: MixConfig | None = None) -> list[Step]:
    """Return the steps of a calibration, in order. Without `recon`, or with 0 iterations, nothing is learned.

    Without `mix` all inputs have the same bits.
    """
    units = list(qnn.units())
    steps = [Step(phase="weights", unit=unit) for unit in units] if recon and recon.iters_w else []
    if qnn.config.quant_act:
        steps += [Step(phase="mixing")] if mix else []
        steps.append(Step(phase="ranges"))
        if recon and recon.iters_a:
            steps += [Step(phase="activations", unit=unit) for unit in units]
    return steps


def step_work(step: Step, recon: ReconConfig | None, samples: int, mix: MixConfig | None = None) -> int:
    """Return the total that `calibrate` reports to `progress` for a step: samples captured, plus iterations."""
    if step.phase == "mixing" and mix is not None:
        return 2 * min(mix.samples, samples)
    if step.phase == "ranges" or recon is None:
        return samples
    return 2 * samples + (recon.iters_w if step.phase == "weights" else recon.iters_a)


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

    recon: how units are learned; None rounds weights to nearest and fits ranges, and learns nothing.
    mix: which inputs get more bits than act_bit; None for none. The config's `mixed_act` holds them afterwards.
    batch_size: samples per forward pass. cache: storage of captured activations. running: see `fit_activations`.
    folder: where finished steps are kept; steps that are there already are loaded. progress(step, n) is called when n
    more iterations or samples are done, see `step_work`. Afterwards all weights are frozen and all quantizers are on.
    """
    qnn.requires_grad_(False)
    qnn.fit_weights()
    resuming = folder is not None
    for number, step in enumerate(calibration_steps(qnn, recon, mix)):
        if step.phase in ("mixing", "ranges"):
            qnn.freeze()
        saved = folder.load(number) if folder is not None and resuming else None
        if saved is None:
            resuming = False
            advance = partial(progress, step)
            if step.phase == "mixing" and mix is not None:
                shares = mix_activations(qnn, data, mix, batch_size, running=running, progress=advance)
                report = {"phase": "mixing", "unit": "", "shares": shares}
            elif step.phase == "ranges" or recon is None:
                fit_activations(qnn, data, batch_size, running=running, seed=seed, progress=advance)
                report = {"phase": "ranges", "unit": ""}
            else:
                options = {"batch_size": batch_size, "cache": cache, "progress": advance}
                report = unit_reconstruction(qnn, step.unit, data, recon, phase=step.phase, **options).to_dict()
            if folder is not None and rank() == 0:
                folder.save(number, _result(qnn, step), report)
            barrier()
        else:
            tensors, report = saved
            if step.phase == "mixing" and mix is not None:
                qnn.mix_act(dict.fromkeys(report["shares"], mix.bits))
            weights = step.phase == "weights"
            load_tensors(qnn, tensors, step.unit, weights=weights, acts=not weights)
        yield step, report
    qnn.freeze()
    qnn.set_quant_state(True, qnn.config.quant_act)


def _result(qnn: QuantModel, step: Step) -> dict[str, Tensor]:
    """Return the tensors that a step has changed."""
    tensors = weight_tensors if step.phase == "weights" else activation_tensors
    return tensors(qnn, step.unit)
