"""Keep what was measured of a calibration's model beside its finished steps, so that going on measures nothing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dsdiff.calibration.data import DataPlan
from dsdiff.calibration.measure import GptqSpeeds, Learning, Pass, Sizes
from dsdiff.calibration.needs import Measured, Workload
from dsdiff.calibration.options import CalibrationOptions
from dsdiff.environment import choose_device, machine
from dsdiff.models.lora import lora_facts
from dsdiff.models.spec import ModelSpec
from qdiff.calibrate import Step
from qdiff.distributed import sum_over_ranks, world_size
from qdiff.quant_model import QuantModel
from qdiff.resume import ProgressFolder

NAME = "measured"  # of the file, without its suffix


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurements of a calibration's model, as a file in the calibration's progress folder.

    folder: that folder. facts: all that the measurements depend on, as values of JSON; a file with others is not used.
    """

    folder: ProgressFolder
    facts: Mapping[str, Any]

    def read(self, covers: Callable[[Measured], bool]) -> Measured | None:
        """Return the measurements if all processes find them and `covers` accepts them, else None. All call this."""
        measured = _parsed(self.folder.kept(NAME), json.loads(json.dumps(self.facts)))
        found = torch.tensor([int(measured is not None and covers(measured))])
        sum_over_ranks([found])  # measuring is the work of all
        return measured if int(found) == world_size() else None

    def write(self, measured: Measured) -> None:
        """Write the measurements, for a calibration that has begun."""
        learning = [[step.phase, step.unit, asdict(each)] for step, each in measured.learning.items()]
        content = {**asdict(replace(measured, learning={})), "learning": learning}
        self.folder.keep(NAME, {"facts": self.facts, "measured": content})


def measured_with(
    spec: ModelSpec, qnn: QuantModel, plan: DataPlan, work: Workload, options: CalibrationOptions
) -> dict[str, Any]:
    """Return all that measurements depend on: the model, what is done with it, the machine."""
    return {
        **spec.hashes,
        "lora": lora_facts(options.lora),
        "merge": None if options.merge is None else asdict(options.merge),
        "config": asdict(qnn.config),
        "recon": None if work.recon is None else asdict(work.recon),
        "mix": None if work.mix is None else asdict(work.mix),
        "batch_size": work.batch_size,
        "data": [plan.samples, plan.x, plan.context],
        "processes": world_size(),
        "machine": machine(choose_device(options.device)),
    }


def _parsed(content: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> Measured | None:
    """Return the content of a file; None for none, for one with other facts, and for a damaged one."""
    if content is None or content.get("facts") != facts:
        return None
    try:
        found = content["measured"]
        kinds = {"plain": Pass, "weights": Pass, "both": Pass, "drawing": Pass, "probe": Learning, "gptq": GptqSpeeds}
        parts = {name: kind(**found[name]) if found[name] is not None else None for name, kind in kinds.items()}
        learning = {Step(phase=phase, unit=unit): Learning(**each) for phase, unit, each in found["learning"]}
        return Measured(**{**found, **parts, "sizes": Sizes(**found["sizes"]), "learning": learning})
    except (KeyError, TypeError, ValueError):
        return None
