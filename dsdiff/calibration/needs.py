"""Compute what a calibration needs in time, memory and disk, from measurements of its model."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsdiff.calibration.data import DataPlan
from dsdiff.calibration.disk import act_entries, disk_bytes, target_bytes, weight_entries
from dsdiff.calibration.measure import (
    GptqSpeeds,
    Learning,
    Pass,
    Sizes,
    fitting_seconds,
    measure_gptq,
    measure_learning,
    measure_pass,
    measure_probe,
    measure_sizes,
    placeholder_ranges,
    range_seconds,
)
from dsdiff.environment import precision_context
from qdiff.calibrate import Step, calibration_steps
from qdiff.config import MixConfig, ReconConfig
from qdiff.distributed import world_size
from qdiff.gptq import CHUNK, EXACT
from qdiff.observers import SAMPLED_VALUES
from qdiff.quant_model import QuantModel
from qdiff.sensitivity import BACKWARD

WRITING = 2e8  # bytes a second that a disk takes at least


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a calibration.

    recon, mix: see `qdiff.calibrate`. batch_size: samples per forward pass. cache: bytes of activations that each
    process keeps in memory. format: of the cali_ckpt. finished: steps done by an interrupted run.
    """

    recon: ReconConfig | None
    batch_size: int
    cache: int
    mix: MixConfig | None = None
    format: str = "dsdiff"
    finished: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The needs of a calibration, of all processes on this machine together.

    phases: seconds of each phase that is left. memory: bytes of main memory beyond the loaded model. disk: bytes at
    most, files that are removed at the end included. gpu_memory: as memory, for the GPU of each process, 0 without one.
    """

    phases: Mapping[str, float]
    memory: int
    disk: int
    gpu_memory: int = 0

    @property
    def seconds(self) -> float:
        """The seconds of all phases."""
        return sum(self.phases.values())


# --- what is needed ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of a model that an estimate needs.

    plain, weights, both: passes without quantization, with quantized weights, and with quantized activations as well;
    a pass that the calibration does not make is None. drawing: plain, in the precision in which data is drawn; None if
    none is. probe: the gradients by which inputs are ranked, of a sample. learning: of each step that learns. fitting:
    seconds of all ranges of weights. ranges: seconds of one range of an activation. gptq: None without it.
    """

    sizes: Sizes
    plain: Pass
    weights: Pass
    both: Pass | None
    drawing: Pass | None
    probe: Learning | None
    learning: Mapping[Step, Learning]
    fitting: float
    ranges: float
    gptq: GptqSpeeds | None


def measure(qnn: QuantModel, plan: DataPlan, work: Workload) -> Measured:
    """Measure all that the calibration of this model will do. The model is left as it was."""
    recon, steps = work.recon, left_steps(qnn, work)
    learned = [step for step in steps if _learns(step, recon)]
    sizes = measure_sizes(qnn, plan)
    samples = min(work.batch_size, plan.samples)
    qnn.requires_grad_(False)
    with placeholder_ranges(qnn):
        plain = measure_pass(qnn, plan, samples)
        with qnn.quant_state(True, False, dynamic=True):
            weights = measure_pass(qnn, plan, samples)
        both = None
        if any(step.phase == "activations" for step in steps):
            with qnn.quant_state(True, True):
                both = measure_pass(qnn, plan, samples)
        mixes = work.mix is not None and any(step.phase == "mixing" for step in steps)
        return Measured(
            sizes=sizes,
            plain=plain,
            weights=weights,
            both=both,
            drawing=_measure_drawing(qnn, plan, samples) if plan.drawn else None,
            probe=measure_probe(qnn, plan, probe_batch(plan, work)) if mixes else None,
            learning={step: measure_learning(qnn, step, sizes, recon) for step in learned if recon is not None},
            fitting=fitting_seconds(qnn),
            ranges=range_seconds(qnn),
            gptq=measure_gptq(qnn) if recon is not None and recon.rounding == "gptq" else None,
        )


def _measure_drawing(qnn: QuantModel, plan: DataPlan, samples: int) -> Pass:
    with precision_context(next(qnn.parameters()).device, plan.precision):
        return measure_pass(qnn, plan, samples)


def probe_batch(plan: DataPlan, work: Workload) -> int:
    """Return how many samples inputs are ranked with at a time."""
    return min(work.batch_size, BACKWARD, plan.samples, BACKWARD if work.mix is None else work.mix.samples)


def covers(measured: Measured, qnn: QuantModel, plan: DataPlan, work: Workload) -> bool:
    """Return True if all was measured that an estimate of this work needs."""
    steps = left_steps(qnn, work)
    learned = {step for step in steps if _learns(step, work.recon)}
    mixed = measured.probe is not None or not any(step.phase == "mixing" for step in steps)
    return mixed and learned <= measured.learning.keys() and (not plan.drawn or measured.drawing is not None)


def left_steps(qnn: QuantModel, work: Workload) -> list[Step]:
    """Return the steps that are not finished."""
    return calibration_steps(qnn, work.recon, work.mix)[work.finished :]


def _learns(step: Step, recon: ReconConfig | None) -> bool:
    gptq = recon is not None and recon.rounding == "gptq"
    return step.phase == "activations" or (step.phase == "weights" and not gptq)


def needs(qnn: QuantModel, plan: DataPlan, work: Workload, measured: Measured) -> Estimate:
    """Return the needs of a calibration, from what was measured for it, see `covers`."""
    steps = left_steps(qnn, work)
    assert covers(measured, qnn, plan, work)
    cached = max((_captured(step, plan, measured) for step in steps if _learns(step, work.recon)), default=0)
    in_memory = min(cached, work.cache)
    main, at_work = plan.bytes_held, _memory(qnn, plan, work, measured)
    on_gpu = next(qnn.parameters()).device.type == "cuda"
    spilled = (cached - in_memory) * local_processes()
    return Estimate(
        phases=_phases(qnn, plan, work, measured),
        memory=(main + in_memory + (0 if on_gpu else at_work)) * local_processes(),
        disk=disk_bytes(qnn, plan, calibration_steps(qnn, work.recon, work.mix), work.format, spilled, work.finished),
        gpu_memory=at_work if on_gpu else 0,
    )


def _captured(step: Step, plan: DataPlan, measured: Measured) -> int:
    """Return the bytes of the inputs and outputs of the step's unit, for all samples."""
    return plan.samples * measured.sizes.unit_bytes(step.unit)


# --- time --------------------------------------------------------------------------------------------------


def _phases(qnn: QuantModel, plan: DataPlan, work: Workload, measured: Measured) -> dict[str, float]:
    """Return the seconds of each phase that is left."""
    written = target_bytes(qnn, work.format, []) / WRITING
    drawing = measured.drawing if plan.drawn else None
    phases = {} if drawing is None else {"data": drawing.seconds * plan.drawn}
    for step in left_steps(qnn, work):
        seconds = _step_seconds(qnn, step, plan, work, measured)
        phases[step.phase] = phases.get(step.phase, 0.0) + seconds
    return phases | {"writing": written}


def _step_seconds(qnn: QuantModel, step: Step, plan: DataPlan, work: Workload, measured: Measured) -> float:
    recon, mix = work.recon, work.mix
    if step.phase == "fitting":
        return measured.fitting
    fits = measured.ranges * len(act_entries(qnn)) / 2
    if step.phase == "mixing" and mix is not None and measured.probe is not None:  # processes share none of it
        passes = measured.weights.seconds + mix.probes * measured.probe.seconds
        return min(mix.samples, plan.samples) * passes + fits
    if step.phase == "ranges" or recon is None:
        return measured.weights.seconds * plan.samples + fits
    if not _learns(step, recon):
        return _gptq_seconds(qnn, step, plan, recon, measured)
    own = measured.both if step.phase == "activations" else measured.weights
    assert own is not None
    unit, inputs = step.unit, measured.plain if recon.sym else own
    evaluations = 2 * (own.ends[unit] - own.begins[unit])
    passes = measured.plain.ends[unit] + inputs.begins[unit] + evaluations
    steps = recon.iters_a if step.phase == "activations" else recon.iters_w
    return (passes * plan.samples + steps * measured.learning[step].seconds) / world_size()


def _gptq_seconds(qnn: QuantModel, step: Step, plan: DataPlan, recon: ReconConfig, measured: Measured) -> float:
    """Return the time of a unit in GPTQ's pass: its layers' outputs, the sums over their inputs, and the rounding."""
    samples = min(recon.samples_w, plan.samples) / world_size()
    plain, quantized = measured.plain, measured.weights
    assert measured.gptq is not None
    seconds = samples * (plain.ends[step.unit] - plain.begins[step.unit])
    if not recon.sym:
        seconds += samples * (quantized.ends[step.unit] - quantized.begins[step.unit])
    named = zip(qnn.layers().items(), measured.sizes.columns, measured.sizes.places, strict=True)
    for (name, layer), n, places in named:
        if name == step.unit or name.startswith(f"{step.unit}."):
            rows = len(layer.weight)
            sums = samples * places * n * (n + (0 if recon.sym else 2 * rows))
            factors = n**3 / 3 + rows * n**2 * (3 if recon.sym else 5)
            exact = measured.gptq.double if n <= EXACT else measured.gptq.single
            seconds += sums * measured.gptq.single + factors * exact + n * measured.gptq.column
    return seconds


# --- memory ------------------------------------------------------------------------------------------------


def _memory(qnn: QuantModel, plan: DataPlan, work: Workload, measured: Measured) -> int:
    """Return the bytes of a process beyond the model, the calibration data, and the activations that it captures."""
    codes = sum(weight_entries(qnn).values())
    return codes + max(_memory_of_phases(qnn, plan, work, measured))


def _memory_of_phases(qnn: QuantModel, plan: DataPlan, work: Workload, measured: Measured) -> Iterator[int]:
    """Yield what each phase needs at most, beside the codes of all weights."""
    phases = {step.phase for step in left_steps(qnn, work)}
    recon, plain = work.recon, measured.plain
    yield target_bytes(qnn, work.format, []) * (2 if work.format == "dsdiff" else 1)  # copies, and what is written
    if plan.drawn and measured.drawing is not None:
        yield measured.drawing.memory * plan.together // measured.drawing.samples
    if "fitting" in phases:
        yield 2 * max(4 * layer.weight.numel() for layer in qnn.layers().values())
    if "ranges" in phases:
        yield measured.weights.memory + 4 * SAMPLED_VALUES * len(act_entries(qnn)) // 2
    if "mixing" in phases and measured.probe is not None:
        yield measured.probe.memory
    if measured.learning:
        passes = [plain, measured.weights, *([] if measured.both is None else [measured.both])]
        yield max(*(each.memory for each in measured.learning.values()), *(each.memory for each in passes))
    if "weights" in phases and recon is not None and recon.rounding == "gptq":
        yield gptq_bytes(measured.sizes, min(recon.samples_w, plan.samples) / world_size())


def gptq_bytes(sizes: Sizes, samples: float) -> int:
    """Return what GPTQ needs at most for so many samples at once.

    These are activations, inputs laid out as columns and a copy of them, the sums over them, and factors.
    """
    layers = zip(sizes.columns, sizes.layer_bytes, sizes.places, strict=True)
    return int(
        max(
            samples * (sizes.skip_bytes + 2 * size)
            + 8 * min(CHUNK, samples * places * n)
            + (12 if n > EXACT else 20) * n**2
            for n, size, places in layers
        )
    )


def local_processes() -> int:
    """Return how many processes of this calibration share the machine's memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
