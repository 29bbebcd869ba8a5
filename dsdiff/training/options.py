"""The options of a training run, and the contents of its config file. Nothing here imports torch."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dsdiff.checks import check_whole
from dsdiff.models.configs import read_config
from ldm.fileio import check_writable
from tomesd.options import MergeOptions


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of one run of the training that a config file describes.

    config: a file such as those of configs/shapes.
    outdir: the run's folder; None: runs/<name of the config>.
    restart: begin anew although the folder holds a run.
    max_steps: stop after so many steps, 1 or more; None: the config's number.
    export: where to write the float16 weights; None: where the config says; "": nowhere.
    export_only: do not train, but write the weights of the run's last checkpoint.
    device: auto, cpu or cuda. devices: GPUs, or processes on the CPU, 1 or more.
    seed: of weights, order and noise, in 0..2**31.

    Raises ValueError for values out of range.
    """

    config: Path
    outdir: Path | None = None
    restart: bool = False
    max_steps: int | None = None
    export: str | None = None
    export_only: bool = False
    device: str = "auto"
    devices: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be 1 or more, got {self.max_steps}")
        if self.devices < 1:
            raise ValueError(f"devices must be 1 or more, got {self.devices}")
        if not 0 <= self.seed <= 2**31:
            raise ValueError(f"seed must be in 0..{2**31}, got {self.seed}")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.outdir or Path("runs") / self.config.stem

    @property
    def last(self) -> Path:
        """The run's last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sets of a training, as configs with `target` and `params`, and how they are read.

    batch_size: pictures per step, on all devices together. Raises ValueError for values out of range.
    """

    batch_size: int
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("num_workers", self.num_workers, 0)


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights that a part of a model begins with: those of `file` whose names begin with `prefix`, without it.

    file: a name is taken, too. Raises ValueError for what is none.
    """

    file: Path
    prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.file, str | Path) or not isinstance(self.prefix, str):
            raise ValueError(f"file is {self.file!r} and prefix {self.prefix!r}: both must be names")
        object.__setattr__(self, "file", Path(self.file))


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of the trainer: length, precision, checkpoints, and the files to begin with and to end in.

    precision: as Lightning's Trainer takes it, such as 32-true or bf16-mixed.
    gradient_clip_val: largest norm of the gradient; None: not clipped.
    checkpoint_every, log_images_every: steps between checkpoints (with a validation) and between sample grids; 0
        writes no grids.
    compile: compile the training steps of a LatentDiffusion's UNet (torch.compile), on a GPU; on a CPU it has no
        effect.
    merge: how tokens are merged while a LatentDiffusion is trained, and its samples drawn; None: not at all. With few
        keys and values merged into many (`merge_kv`, `proportional`) the result is nearly the same, in less time.
    export: where to write the float16 weights at the end; None: nowhere.
    init_from: prefix of the model's keys -> the weights of that part, whose keys lack the prefix.

    Raises ValueError for values out of range.
    """

    max_steps: int
    checkpoint_every: int
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    log_images_every: int = 0
    compile: bool = False
    merge: MergeOptions | None = None
    export: Path | None = None
    init_from: Mapping[str, InitialWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "checkpoint_every"):
            check_whole(name, getattr(self, name), 1)
        check_whole("log_images_every", self.log_images_every, 0)
        if self.export is not None and not isinstance(self.export, str | Path):
            raise ValueError(f"export is {self.export!r}: it must be the name of a file")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Content of a config file: the model (`target` and `params`), its learning rate, its data, its trainer."""

    model: Mapping[str, Any]
    learning_rate: float
    data: DataConfig
    trainer: TrainerConfig


T = TypeVar("T", DataConfig, TrainerConfig, InitialWeights)


def read_training_config(options: TrainingOptions) -> TrainingConfig:
    """Read the config file, and change in it what the options say.

    A file with `base: FILE` has all of that file's settings but for those that it names anew.
    Raises OSError or ValueError, before anything is trained, for a file that describes no training, and for options
    that cannot work with it.
    """
    content, source = _read_with_base(options.config), str(options.config)
    lacking = [part for part in ("model", "data", "trainer") if not isinstance(content.get(part), Mapping)]
    if lacking:
        raise ValueError(f"config {source!r} has no {', '.join(lacking)}: it does not describe a training")
    if "base_learning_rate" not in content["model"]:
        raise ValueError(f"config {source!r} has no base_learning_rate in its model: it does not describe a training")
    trainer = _read_part(TrainerConfig, content["trainer"], f"trainer in config {source!r}")
    trainer = replace(
        trainer,
        max_steps=options.max_steps or trainer.max_steps,
        export=_export_path(options, trainer),
        merge=_merge_options(content["trainer"].get("merge"), source),
        init_from=_init_from(content["trainer"].get("init_from"), source),
    )
    check_writable(options.folder)
    return TrainingConfig(
        model={name: value for name, value in content["model"].items() if name != "base_learning_rate"},
        learning_rate=_learning_rate(content["model"]["base_learning_rate"], source),
        data=_read_part(DataConfig, content["data"], f"data in config {source!r}"),
        trainer=trainer,
    )


def _read_with_base(path: Path) -> dict[str, Any]:
    """Read a config over the one that it names as its `base`, if any. Raise ValueError for the base of a base."""
    content = read_config(path)
    if "base" not in content:
        return content
    name = content.pop("base")
    if not isinstance(name, str):
        raise ValueError(f"the base of config {str(path)!r} is {name!r}: it must be the name of a config")
    base = read_config(Path(name))
    if "base" in base:
        raise ValueError(f"the base of config {str(path)!r} has a base itself: one is all that can be")
    return over(base, content)


def over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with `changes` in place of what `base` has under the same names."""
    both = {**base, **changes}
    return {
        name: over(base[name], value) if isinstance(value, Mapping) and isinstance(base.get(name), Mapping) else value
        for name, value in both.items()
    }


def _export_path(options: TrainingOptions, trainer: TrainerConfig) -> Path | None:
    """Return where the weights are written, None for nowhere. Raise OSError or ValueError for what cannot be."""
    target = trainer.export if options.export is None else options.export
    if target and Path(target).suffix != ".safetensors":
        raise ValueError(f"--export {target} must end in .safetensors")
    if options.export_only and not target:
        raise ValueError("--export_only has nowhere to write to: add --export FILE")
    if options.export_only and not options.last.exists():
        raise FileNotFoundError(f"no checkpoint at {str(options.last)!r}: train first")
    return Path(target) if target else None


def _merge_options(given: Mapping[str, Any] | None, source: str) -> MergeOptions | None:
    if given is None:
        return None
    try:
        return MergeOptions(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"merge of the trainer in config {source!r}: {error}") from error


def _learning_rate(given: Any, source: str) -> float:
    try:
        rate = float(given)
    except (TypeError, ValueError):
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"base_learning_rate in config {source!r} is {given!r}: it must be a number above 0")
    return rate


def _init_from(given: Any, source: str) -> dict[str, InitialWeights]:
    """Read init_from: for each part the name of a file, or a mapping with `file` and `prefix`; None for no parts."""
    if not isinstance(given or {}, Mapping):
        raise ValueError(f"init_from in config {source!r} is {given!r}: it must name a file for each part of the model")
    parts = {prefix: {"file": each} if isinstance(each, str) else each for prefix, each in (given or {}).items()}
    return {
        prefix: _read_part(InitialWeights, each, f"init_from in config {source!r}") for prefix, each in parts.items()
    }


def _read_part(kind: type[T], content: Mapping[str, Any], what: str) -> T:
    """Make a dataclass from a part of a config. Raise ValueError for fields that are unknown, missing, or wrong."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{what}: {content!r} is no mapping of names to values")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(map(str, content)) - known.keys())
    if unknown:
        raise ValueError(f"{what}: unknown {', '.join(unknown)} (known: {', '.join(known)})")
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{what}: {', '.join(missing)} is missing")
    try:
        return kind(**content)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
