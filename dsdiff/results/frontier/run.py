"""Compare ways to draw with a base: error of eps in one step, PSNR of pictures, attributes, time of a call.

Each figure is kept in a file of its own, so that an interrupted run goes on where it stopped, and a setting that is
added is measured alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dsdiff.benchmark.comparison import all_cores
from dsdiff.cache_schedule import CacheSchedule
from dsdiff.calibration import cached_steps
from dsdiff.calibration.cached_steps import prompts_of
from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import choose_device, machine, versions
from dsdiff.metrics.attributes import Share
from dsdiff.metrics.eps_errors import EpsErrors
from dsdiff.metrics.intervals import mean_and_error
from dsdiff.metrics.pair_scores import psnr, squared_errors
from dsdiff.models.registry import EMBEDDED, READER
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.pipeline import Pipeline
from dsdiff.results.drawing import DrawModel, DrawTask
from dsdiff.results.frontier import timing
from dsdiff.results.frontier.figures import Costs, Eps, Pictures, Row, Time
from dsdiff.results.frontier.joined import joined, matching, read_comparisons
from dsdiff.results.frontier.options import CALLS, Candidate, FrontierOptions, read_candidates
from dsdiff.results.quantization_cost import attributes_right, captions_of
from ldm.data.reader import ShapesReader
from ldm.fileio import check_writable, write_atomically

logger = logging.getLogger(__name__)

# Of schedules of cached steps: pictures, the seed of their noise, and how long features may be kept.
SCHEDULE_N, SCHEDULE_SEED, LONGEST = 8, 10**6, 10


def compare(options: FrontierOptions) -> Costs:
    """Measure all ways to draw. Raises ValueError or OSError for what cannot be, before anything is measured."""
    candidates = read_candidates(options.settings, options.names)
    drawing = {name: value for name, value in asdict(options.draw).items() if value}
    others = None if options.quality is None else read_comparisons(options.quality)
    spec = find_model(options.model)
    check_writable(options.outdir)
    comparison = Comparison(options, spec, _prompts(options, spec))
    model = str(comparison.pipeline)
    other = None if others is None else matching(others, model, drawing, str(options.quality))
    for line in (comparison.pipeline, *comparison.pipeline.notes):
        logger.info("%s", line)
    costs = Costs(
        model=model,
        time_of=comparison.time_of,
        machine=machine(comparison.device),
        versions=versions(),
        drawing=drawing,
        n=options.n,
        seed=options.seed,
        steps=comparison.settings.steps_taken,
        calls=options.calls,
        repeats=options.repeats,
        rows=list(comparison.rows(candidates)),
    )
    return costs if other is None else joined(costs, other)


def _prompts(options: FrontierOptions, spec: ModelSpec) -> list[str]:
    """Return n prompts, those of the file in turn; without a file captions of shapes, half of them held out."""
    if options.prompts is not None:
        return prompts_of(spec, options.prompts, options.n)
    if spec.config_path.resolve().is_relative_to(EMBEDDED.parent.resolve()) or spec.bundle:
        return captions_of(options.n, options.seed)
    raise ValueError(f"no prompts are known for {spec.description}: give --prompts FILE")


class Comparison:
    """The model, the prompts and the kept files, which the measurements of all ways to draw share."""

    def __init__(self, options: FrontierOptions, spec: ModelSpec, prompts: Sequence[str]):
        self.options, self.prompts = options, prompts
        self.device = choose_device(options.device)
        self.model = DrawModel(
            spec=spec, device=options.device, tokenizer=options.tokenizer, quantization=options.quantization
        )
        self.pipeline: Pipeline = self.model.open()
        self.settings: DrawSettings = self.pipeline.resolve(options.draw)
        self._schedules: dict[str, list[CacheSchedule]] = {}  # of all numbers of whole steps, by the hash of the rest
        self.time_of = str(self.pipeline) if options.time_of == "model" else f"sd-v1, {options.engine}"

    def rows(self, candidates: Sequence[Candidate]) -> Iterator[Row]:
        """Yield the row of each candidate, behind a bar."""
        measures: dict[str, Callable[[Candidate], Any]] = {
            "eps": self._eps,
            "pictures": self._pictures,
            "attributes": self._attributes,
            "time": self._time,
        }
        for candidate in candidates:
            self._of(candidate)  # errors come before the work
        wanted = [(part, candidate) for part in measures if part in self.options.parts for candidate in candidates]
        found: dict[str, dict[str, Any]] = {candidate.name: {} for candidate in candidates}
        for part, candidate in tqdm(wanted, "settings", unit="figure"):
            found[candidate.name][part] = measures[part](candidate)
        for candidate in candidates:
            yield Row(name=candidate.name, changes=candidate.changes, **found[candidate.name])

    # --- the figures --------------------------------------------------------------------------------

    def _eps(self, candidate: Candidate) -> Eps:
        def measure() -> dict[str, Any]:
            errors = self._eps_errors.of(self._of(candidate), candidate.name)
            mean, error = mean_and_error(errors.mean(1))
            return {"mse": mean, "error": error, "by_call": errors.mean(0).tolist()}

        return Eps(**self._kept("eps", candidate.name, self._facts(candidate), measure))

    @cached_property
    def _eps_errors(self) -> EpsErrors:
        options = self.options
        return EpsErrors(self.pipeline, self.settings, self.prompts, options.seed, options.batch_size)

    def _pictures(self, candidate: Candidate) -> Pictures:
        def measure() -> dict[str, Any]:
            errors = squared_errors(self._drawn(candidate), self._base)
            each = torch.tensor([psnr(error) for error in errors if error > 0], dtype=torch.float64)
            mean, error = mean_and_error(each) if len(each) > 1 else (None, None)
            return {"psnr": psnr(errors) if errors.any() else None, "mean": mean, "error": error, "pairs": len(each)}

        return Pictures(**self._kept("pictures", candidate.name, self._facts(candidate), measure))

    def _attributes(self, candidate: Candidate) -> Share:
        def measure() -> dict[str, Any]:
            right, asked = attributes_right(
                self._drawn(candidate), self.prompts, ShapesReader.from_file(READER), self.options.batch_size
            )
            return asdict(Share.of(right, asked))

        return Share(**self._kept("attributes", candidate.name, self._facts(candidate), measure))

    @cached_property
    def _base(self) -> Tensor:
        return self._drawn(Candidate(name="base"))

    def _drawn(self, candidate: Candidate) -> Tensor:
        """Return pictures, uint8 [N, H, W, 3], drawn if they are not there."""
        task = DrawTask.plan(
            self.model,
            candidate.options(self.options.draw, self._schedule(candidate)),
            title=f"pictures, {candidate.name}",
            prompts=self.prompts,
            seed=self.options.seed,
            batch_size=self.options.batch_size,
            root=self.options.outdir / "pictures",
            name=_slug(candidate.name),
        )
        task.draw()
        return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in task.paths])

    def _time(self, candidate: Candidate) -> Time:
        options, own = self.options, self._of(candidate)
        steps = self.settings.steps_taken
        unlike = any(map(timing.follows_steps, (own, self.settings)))
        calls = options.calls or (steps if unlike else CALLS)
        if unlike and calls != steps:
            raise ValueError(f"--calls {calls}: in {candidate.name!r} steps are unlike, so all {steps} are timed")

        def measure() -> dict[str, Any]:
            with all_cores(self.device):
                times = timing.side_by_side(
                    self._running, own, self.settings, self.device, calls=calls, repeats=options.repeats
                )
            return {"own": times[0], "base": times[1]}

        facts = {
            "settings": asdict(own),
            "time_of": self._model_facts(self.settings) if options.time_of == "model" else self.time_of,
            "calls": calls,
            "repeats": options.repeats,
            "machine": machine(self.device),
            "versions": versions(),
        }
        return Time(**self._kept("time", candidate.name, facts, measure))

    @cached_property
    def _running(self) -> timing.Running:
        if self.options.time_of == "model":
            return timing.of_pipeline(self.pipeline)
        return timing.of_sd_v1(self.options.engine, self.device)

    # --- how a candidate draws ----------------------------------------------------------------------------

    def _of(self, candidate: Candidate) -> DrawSettings:
        """Return how a candidate draws. Raises ValueError for what the model cannot."""
        return self.pipeline.resolve(candidate.options(self.options.draw, self._schedule(candidate)))

    def _schedule(self, candidate: Candidate) -> Path | None:
        """Return the file of the schedule of cached steps that a candidate asks for; None if it asks for none.

        It is found on noise that nothing is measured with, and on the model's own prompts if none are given.
        """
        if candidate.whole is None:
            return None
        own = {name: value for name, value in candidate.drawing.items() if name != "cache_depth"}
        plain = Candidate(name=candidate.name, merge=candidate.merge, drawing=own)
        settings, depth = self._of(plain), candidate.drawing.get("cache_depth", 1)
        whole = max(1, round(candidate.whole * settings.steps_taken))
        facts = {**self._model_facts(settings), "depth": depth}
        key = _hash({**facts, "whole": whole})
        path = self.options.outdir / "schedules" / f"{_slug(candidate.name)}-{key}.json"
        if not path.is_file():
            kept = self._schedules
            if _hash(facts) not in kept:
                search = cached_steps.Search(
                    prompts=prompts_of(self.pipeline.spec, self.options.prompts, SCHEDULE_N),
                    seed=SCHEDULE_SEED,
                    batch_size=SCHEDULE_N,
                    depth=depth,
                    longest=LONGEST,
                )
                kept[_hash(facts)] = cached_steps.schedules(self.pipeline, settings, search)
            cached_steps.write(cached_steps.pick(kept[_hash(facts)], whole=whole), path)
        return path

    # --- kept files ---------------------------------------------------------------------------------------

    def _model_facts(self, settings: DrawSettings) -> dict[str, Any]:
        return {"settings": asdict(settings), "hashes": self.model.spec.hashes, "device": self.device.type}

    def _facts(self, candidate: Candidate) -> dict[str, Any]:
        """Return all that a figure of quality depends on."""
        options = self.options
        own = {"prompts": list(self.prompts), "seed": options.seed, "batch_size": options.batch_size}
        base = {"base": asdict(self.settings)}
        return {**own, **base, **self._model_facts(self._of(candidate)), "versions": versions()}

    def _kept(
        self, part: str, name: str, facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the figures in a file whose name has a hash of the facts; measure and write them if it is missing."""
        path = self.options.outdir / "figures" / f"{part}-{_slug(name)}-{_hash(facts)}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        figures = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(figures) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        return figures


def _hash(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _slug(name: str) -> str:
    """Return a name that can be part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
