"""The models and LoRAs among which requests choose, by their titles."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsdiff.models.registry import CHECKPOINTS, CONFIGS
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.options import LoraOptions, ModelOptions, QuantizationOptions
from dsdiff.pipeline import Pipeline
from dsdiff.server.options import ModelChoice

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".ckpt")
LORA_WEIGHTS = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model on the shelf: its title, its files, and how it is quantized.

    own: whether it is the one that the server was started with, whose tokenizer and embeddings are given.
    """

    title: str
    spec: ModelSpec
    quantization: QuantizationOptions | None = None
    tokenizer: Path | None = None
    own: bool = False


class Shelf:
    """The models of a server by title, the one that it starts with first, and its LoRAs by name.

    A model comes once as it is, and once for each of the calibrations that come with it. Reads headers of files only.
    Raises ValueError or FileNotFoundError for a first model, or folders, that cannot be read; other files that are no
    models, and those whose title or name another one has, are left out with a warning.
    """

    def __init__(self, choice: ModelChoice):
        self.choice = choice
        for folder in (choice.model_dir, choice.lora_dir):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(2, "No such directory", str(folder))
        self.entries: dict[str, Entry] = {}
        self.loras: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the folders again."""
        entries: dict[str, Entry] = {}
        for entry in (*self._own(), *self._known(), *self._of_folder()):
            first = entries.setdefault(entry.title, entry)
            if first.spec.ckpt.resolve() != entry.spec.ckpt.resolve():
                logger.warning("%s is left out: %s has its title, too", entry.spec.ckpt, first.spec.ckpt)
        self.entries, self.loras = entries, self._find_loras()

    @property
    def first(self) -> Entry:
        """The model that the server starts with."""
        return next(iter(self.entries.values()))

    def find(self, title: str) -> Entry:
        """Return the model of a title, or of a title without regard to case. Raises ValueError for none."""
        entries = self.entries
        entry = entries.get(title) or next((e for name, e in entries.items() if name.lower() == title.lower()), None)
        if entry is None:
            raise ValueError(f"there is no model {title!r}: the models are {', '.join(map(repr, entries))}")
        return entry

    def lora(self, name: str, scale: float) -> LoraOptions:
        """Return the LoRA of a name at a scale. Raises ValueError for a name that no LoRA has."""
        if name not in self.loras:
            known = f"the LoRAs are {', '.join(map(repr, self.loras))}" if self.loras else "the server has none"
            raise ValueError(f"there is no LoRA {name!r}: {known}")
        return LoraOptions(path=self.loras[name], scale=scale)

    def open(self, entry: Entry) -> Pipeline:
        """Return the pipeline of a model, its weights not read yet. Raises ValueError for what cannot work."""
        choice = self.choice
        return Pipeline(
            entry.spec,
            device=choice.device,
            tokenizer=entry.tokenizer,
            quantization=entry.quantization,
            lora=choice.loras if entry.own else (),
            embeddings=choice.embeddings if entry.own else (),
        )

    # --- what there is ------------------------------------------------------------------------------------

    def _own(self) -> Iterator[Entry]:
        choice = self.choice
        spec = find_model(choice.model)
        own = Entry(title="", spec=spec, quantization=choice.quantization, tokenizer=choice.model.tokenizer, own=True)
        quantization = self.open(own).quantization  # it tells what cannot work before the server is there
        title = _title(spec) + ("" if quantization is None or spec.bundle else f" {_bits(quantization.bits)}")
        yield replace(own, title=title)
        yield from (replace(entry, own=True) for entry in _variants(spec, choice.model.tokenizer))

    def _known(self) -> Iterator[Entry]:
        for config in CONFIGS.values():
            if any(path.is_file() for path in CHECKPOINTS[config]):
                yield from _variants(find_model(ModelOptions(config=config)))

    def _of_folder(self) -> Iterator[Entry]:
        folder = self.choice.model_dir
        for path in () if folder is None else sorted(folder.iterdir()):
            if path.is_dir() or path.suffix.lower() in WEIGHTS:
                try:
                    spec = find_model(ModelOptions(ckpt=path))
                except (ValueError, OSError, NotImplementedError) as error:
                    logger.warning("%s is left out: %s", path, error)
                else:
                    yield from _variants(spec)

    def _find_loras(self) -> dict[str, Path]:
        folder = self.choice.lora_dir
        paths = [] if folder is None else [p for p in folder.rglob("*") if p.suffix.lower() in LORA_WEIGHTS]
        loras: dict[str, Path] = {}
        for path in sorted(paths):
            first = loras.setdefault(path.stem, path)
            if first != path:
                logger.warning("%s is left out: %s has its name, too", path, first)
        return loras


def _title(spec: ModelSpec) -> str:
    """Return the short name of a model that comes with the project, or the name of a file or folder."""
    short = {file: name for name, config in CONFIGS.items() for file in CHECKPOINTS[config]}
    name = short.get(spec.ckpt.resolve())
    return name or (spec.ckpt.name if spec.ckpt.is_dir() else spec.ckpt.stem)


def _variants(spec: ModelSpec, tokenizer: Path | None = None) -> Iterator[Entry]:
    """Yield a model as it is, and by each of its calibrations whose file is there."""
    yield Entry(title=_title(spec), spec=spec, tokenizer=tokenizer)
    for name, path in spec.named_cali_ckpts.items():
        if path.is_file():
            quantization = QuantizationOptions(cali_ckpt=path)
            yield Entry(title=f"{_title(spec)} {name}", spec=spec, quantization=quantization, tokenizer=tokenizer)


def _bits(text: str) -> str:
    return text.split()[0]  # "W4A8" of "W4A8 sm16 split"
