"""Compare ways to merge tokens: error of eps in one step, PSNR of pictures, time of a call, each against no merging.

Each figure is kept in a file of its own, so that an interrupted run goes on where it stopped, and a setting that is
added is measured alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dsdiff.benchmark.comparison import all_cores
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import choose_device, machine, versions
from dsdiff.jobs import check_text, read_prompt_file
from dsdiff.metrics.eps_errors import EpsErrors
from dsdiff.metrics.intervals import mean_and_error
from dsdiff.metrics.pair_scores import psnr, squared_errors
from dsdiff.models.registry import EMBEDDED
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.options import MergeOptions
from dsdiff.pipeline import Pipeline
from dsdiff.results.drawing import DrawModel, DrawTask
from dsdiff.results.merging import timing
from dsdiff.results.merging.figures import Eps, MergingCosts, Pictures, Row, Time
from dsdiff.results.merging.options import Candidate, MergingCostOptions, read_candidates
from dsdiff.results.quantization_cost import captions_of
from ldm.fileio import check_writable, write_atomically

logger = logging.getLogger(__name__)


def compare(options: MergingCostOptions) -> MergingCosts:
    """Measure all ways to merge. Raises ValueError or OSError for what cannot be, before anything is measured."""
    candidates = read_candidates(options.settings, options.names)
    spec = find_model(options.model)
    check_writable(options.outdir)
    comparison = Comparison(options, spec, _prompts(options, spec))
    for line in (comparison.pipeline, *comparison.pipeline.notes):
        logger.info("%s", line)
    return MergingCosts(
        model=str(comparison.pipeline),
        time_of=comparison.time_of,
        machine=machine(comparison.device),
        versions=versions(),
        drawing={name: value for name, value in asdict(options.draw).items() if value},
        n=options.n,
        seed=options.seed,
        calls=options.calls,
        repeats=options.repeats,
        rows=list(comparison.rows(candidates)),
    )


def _prompts(options: MergingCostOptions, spec: ModelSpec) -> list[str]:
    """Return n prompts, those of the file in turn; without a file captions of shapes, half of them held out."""
    if options.prompts is not None:
        read = read_prompt_file(options.prompts, "--prompts")
        check_text(read)
        return [read[i % len(read)] for i in range(options.n)]
    if spec.config_path.resolve().is_relative_to(EMBEDDED.parent.resolve()) or spec.bundle:
        return captions_of(options.n, options.seed)
    raise ValueError(f"no prompts are known for {spec.description}: give --prompts FILE")


class Comparison:
    """The model, the prompts and the kept files, which the measurements of all ways to merge share."""

    def __init__(self, options: MergingCostOptions, spec: ModelSpec, prompts: Sequence[str]):
        self.options, self.prompts = options, prompts
        self.device = choose_device(options.device)
        self.model = DrawModel(
            spec=spec, device=options.device, tokenizer=options.tokenizer, quantization=options.quantization
        )
        self.pipeline: Pipeline = self.model.open()
        self.settings: DrawSettings = self.pipeline.resolve(options.draw)
        self.time_of = str(self.pipeline) if options.time_of == "model" else f"sd-v1, {options.engine}"

    def rows(self, candidates: Sequence[Candidate]) -> Iterator[Row]:
        """Yield the row of each candidate, behind a bar."""
        measures = {"eps": self._eps, "pictures": self._pictures, "time": self._time}
        wanted = [(part, candidate) for part in measures if part in self.options.parts for candidate in candidates]
        found: dict[str, dict[str, Any]] = {candidate.name: {} for candidate in candidates}
        for part, candidate in tqdm(wanted, "settings", unit="figure"):
            found[candidate.name][part] = measures[part](candidate)
        for candidate in candidates:
            yield Row(name=candidate.name, merge=asdict(candidate.merge), **found[candidate.name])

    # --- the three figures --------------------------------------------------------------------------------

    def _eps(self, candidate: Candidate) -> Eps:
        def measure() -> dict[str, Any]:
            errors = self._eps_errors.of(replace(self.settings, merge=candidate.merge), candidate.name)
            mean, error = mean_and_error(errors.mean(1))
            return {"mse": mean, "error": error, "by_call": errors.mean(0).tolist()}

        return Eps(**self._kept("eps", candidate.name, self._facts(candidate.merge), measure))

    @cached_property
    def _eps_errors(self) -> EpsErrors:
        options = self.options
        return EpsErrors(self.pipeline, self.settings, self.prompts, options.seed, options.batch_size)

    def _pictures(self, candidate: Candidate) -> Pictures:
        def measure() -> dict[str, Any]:
            errors = squared_errors(self._drawn(candidate.merge, candidate.name), self._unmerged)
            each = torch.tensor([psnr(error) for error in errors if error > 0], dtype=torch.float64)
            mean, error = mean_and_error(each) if len(each) > 1 else (None, None)
            return {"psnr": psnr(errors) if errors.any() else None, "mean": mean, "error": error, "pairs": len(each)}

        return Pictures(**self._kept("pictures", candidate.name, self._facts(candidate.merge), measure))

    @cached_property
    def _unmerged(self) -> Tensor:
        return self._drawn(None, "unmerged")

    def _drawn(self, merge: MergeOptions | None, name: str) -> Tensor:
        """Return pictures, uint8 [N, H, W, 3], drawn if they are not there."""
        task = DrawTask.plan(
            self.model,
            replace(self.options.draw, merge=merge),
            title=f"pictures, {name}",
            prompts=self.prompts,
            seed=self.options.seed,
            batch_size=self.options.batch_size,
            root=self.options.outdir / "pictures",
            name=_slug(name),
        )
        task.draw()
        return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in task.paths])

    def _time(self, candidate: Candidate) -> Time:
        options = self.options

        def measure() -> dict[str, Any]:
            with all_cores(self.device):
                merged, unmerged = timing.side_by_side(
                    self._running, candidate.merge, self.device, calls=options.calls, repeats=options.repeats
                )
            return {"merged": merged, "unmerged": unmerged}

        facts = {
            "merge": asdict(candidate.merge),
            "time_of": self._model_facts(None) if options.time_of == "model" else self.time_of,
            "calls": options.calls,
            "repeats": options.repeats,
            "machine": machine(self.device),
            "versions": versions(),
        }
        return Time(**self._kept("time", candidate.name, facts, measure))

    @cached_property
    def _running(self) -> timing.Running:
        if self.options.time_of == "model":
            return timing.of_pipeline(self.pipeline, self.settings)
        return timing.of_sd_v1(self.options.engine, self.device)

    # --- kept files ---------------------------------------------------------------------------------------

    def _model_facts(self, merge: MergeOptions | None) -> dict[str, Any]:
        settings = asdict(replace(self.settings, merge=merge))
        return {"settings": settings, "hashes": self.model.spec.hashes, "device": self.device.type}

    def _facts(self, merge: MergeOptions | None) -> dict[str, Any]:
        """Return all that a figure of quality depends on."""
        options = self.options
        own = {"prompts": list(self.prompts), "seed": options.seed, "batch_size": options.batch_size}
        return {**own, **self._model_facts(merge), "versions": versions()}

    def _kept(
        self, part: str, name: str, facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the figures in a file whose name has a hash of the facts; measure and write them if it is missing."""
        text = json.dumps(facts, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.options.outdir / "figures" / f"{part}-{_slug(name)}-{key}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        figures = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(figures) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        return figures


def _slug(name: str) -> str:
    """Return a name that can be part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
