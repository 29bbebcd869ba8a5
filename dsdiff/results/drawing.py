"""Folders of pictures that are drawn once. A folder's name holds a hash of all that its pictures depend on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from dsdiff.draw_settings import DrawSettings
from dsdiff.environment import choose_device, versions
from dsdiff.jobs import draw_missing
from dsdiff.models.spec import ModelSpec
from dsdiff.options import DrawOptions, LoraOptions, QuantizationOptions
from dsdiff.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class DrawModel:
    """The options of a pipeline that can be opened.

    spec, device, tokenizer, quantization, lora: see Pipeline.
    """

    spec: ModelSpec
    device: str
    tokenizer: Path | None = None
    quantization: QuantizationOptions | None = None
    lora: tuple[LoraOptions, ...] = ()

    def open(self) -> Pipeline:
        """Return a new pipeline. Its weights are read at first use, and let go with it."""
        return Pipeline(
            self.spec, device=self.device, tokenizer=self.tokenizer, quantization=self.quantization, lora=self.lora
        )


@dataclass(frozen=True, kw_only=True)
class DrawTask:
    """Pictures of `prompts` in `folder`: picture i is drawn from the noise of seed + i. title: of the bar."""

    title: str
    model: DrawModel
    settings: DrawSettings
    prompts: Sequence[str]
    seed: int
    batch_size: int
    folder: Path

    @classmethod
    def plan(
        cls,
        model: DrawModel,
        options: DrawOptions | DrawSettings,
        *,
        title: str,
        prompts: Sequence[str],
        seed: int,
        batch_size: int,
        root: Path,
        name: str,
    ) -> Self:
        """Return the task whose folder is `root` / `name`-KEY, where KEY is a hash of all that the pictures depend on.

        Reads the headers of the model's files. Raises ValueError or OSError for what cannot be drawn.
        """
        settings = options if isinstance(options, DrawSettings) else model.open().resolve(options)
        key = _key(model, settings, prompts, seed, batch_size)
        folder = root / f"{name}-{key}"
        return cls(
            title=title,
            model=model,
            settings=settings,
            prompts=prompts,
            seed=seed,
            batch_size=batch_size,
            folder=folder,
        )

    @property
    def engine(self) -> str:
        """The name of what computes the UNet: float, int8, simulate, or calibration."""
        quantization = self.settings.quantization
        return "float" if quantization is None else quantization.engine or "calibration"

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"{i:05}.png" for i in range(len(self.prompts))]

    def draw(self, opened: Pipeline | None = None) -> None:
        """Draw what is missing. Under torchrun all processes call this, and share the pictures.

        opened: the model's pipeline, for a caller that needs it for more; None opens one if anything is missing.
        """
        seeds = [self.seed + i for i in range(len(self.prompts))]
        open_model = self.model.open if opened is None else lambda: opened
        draw_missing(open_model, self.prompts, seeds, self.paths, self.settings, self.batch_size, self.title)


def _key(model: DrawModel, settings: DrawSettings, prompts: Sequence[str], seed: int, batch_size: int) -> str:
    facts: dict[str, Any] = {
        "options": asdict(settings),
        "hashes": model.spec.hashes,
        "tokenizer": None if model.tokenizer is None else str(model.tokenizer),
        "device": choose_device(model.device).type,
        "batch": batch_size,
        "seed": seed,
        "prompts": list(prompts),
        "versions": versions(),
    }
    if settings.quantization is not None:
        for name in ("cali_ckpt", "low_memory"):  # the file's hash is there as well; the other changes no picture
            del facts["options"]["quantization"][name]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
