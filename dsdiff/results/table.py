"""configs/eval/table.yaml: the rows of the table of results, and how each model is drawn, calibrated and scored.

Its sections hold the fields of the option classes, so that they are checked before anything is drawn.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dsdiff.calibration.options import CalibrationOptions
from dsdiff.checks import check_whole
from dsdiff.metrics.options import ScoringOptions
from dsdiff.models.registry import ROOT
from dsdiff.options import FEW_STEP, DrawOptions, LoraOptions, MergeOptions, QuantizationOptions

T = TypeVar("T")

W4A8 = {"weight_bit": 4, "quant_act": True, "act_bit": 8, "sm_abit": 16, "split": True, "cond": True}
# Fields that the rows, the command or W4A8 set.
DRAWN_ELSEWHERE = ("merge",)
# Fields of DrawOptions that a row may have of its own.
DRAWN = ("sampler", "steps", "scale", "guidance_start", "guidance_stop", "cache", "cache_depth", "vae")
MERGED = ("sx", "sy", "merge_kv", "proportional")  # fields of MergeOptions that a row may have of its own
CALIBRATED_ELSEWHERE = (*W4A8, "model", "merge", "device", "outdir", "resume", "format")
SCORED_ELSEWHERE = ("reference", "paired", "inception_weights", "device", "cache", "save_stats")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to run a model.

    ratio: of token merging, 0 for none. weight_bit, act_bit: None for float. published: the FID of the original work.
    Fields of DRAWN: how its pictures are drawn, see DrawOptions; None draws as the model's other rows, and without
    guidance with samplers of few steps. Fields of MERGED: how tokens are merged, see MergeOptions; None is its default.
    lora: a LoRA, FILE or FILE:SCALE, and cali_ckpt: a calibration in place of the table's, both from the root of the
    repository.
    Raises ValueError for quantized activations or a cali_ckpt with float weights, and for a value out of range.
    """

    name: str
    ratio: float
    sx: int | None = None
    sy: int | None = None
    merge_kv: bool | None = None
    proportional: bool | None = None
    weight_bit: int | None = None
    act_bit: int | None = None
    published: float | None = None
    sampler: str | None = None
    steps: int | None = None
    scale: float | None = None
    guidance_start: float | None = None
    guidance_stop: float | None = None
    cache: int | Path | None = None
    cache_depth: int | None = None
    vae: str | None = None
    lora: str | None = None
    cali_ckpt: str | None = None

    def __post_init__(self) -> None:
        MergeOptions(ratio=self.ratio, **self.merged)  # which checks them
        if self.merged and not self.ratio:
            raise ValueError(f"{self.name}: {', '.join(self.merged)} needs a ratio above 0: no tokens are merged")
        if self.weight_bit is None and self.act_bit is not None:
            raise ValueError(f"{self.name}: activations of {self.act_bit} bits need a weight_bit")
        if self.weight_bit is None and self.cali_ckpt is not None:
            raise ValueError(f"{self.name}: cali_ckpt {self.cali_ckpt!r} needs a weight_bit")

    @property
    def merged(self) -> dict[str, Any]:
        """The fields of MERGED that the row has."""
        return {name: value for name in MERGED if (value := getattr(self, name)) is not None}

    @property
    def drawn(self) -> dict[str, Any]:
        """The fields of DRAWN that the row has, and its LoRA."""
        return {name: value for name in (*DRAWN, "lora") if (value := getattr(self, name)) is not None}

    @property
    def drawn_words(self) -> str:
        """How it is drawn unlike the model's other rows, in words; empty if it is not."""
        values = {name: value.name if isinstance(value, Path) else value for name, value in self.drawn.items()}
        if self.lora is not None:
            values["lora"] = Path(self.lora).name
        words = {name: "" if value is True else f" {value}" for name, value in {**self.merged, **values}.items()}
        return ", ".join(f"{name.replace('_', ' ')}{value}" for name, value in words.items())

    @property
    def title(self) -> str:
        words = self.drawn_words
        return f"{self.name}, ratio {self.ratio:g}" + (f", {words}" if words else "")

    @property
    def key(self) -> str:
        """A name for a folder."""
        words = self.drawn_words.replace(", ", "-")
        mild = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in words)
        return f"{self.name}-{self.ratio:g}" + (f"-{mild}" if mild else "")

    def options(self, base: DrawOptions) -> DrawOptions:
        """Return how its pictures are drawn. base: how those of the model's other rows are.

        Raises ValueError for what cannot be.
        """
        own = {name: value for name, value in self.drawn.items() if name != "lora"}
        unguided = {"scale": None, "guidance_start": 0.0, "guidance_stop": 1.0, "negative_prompt": ""}
        few = unguided if self.sampler in FEW_STEP else {}
        try:
            return replace(base, **{**few, **own, "merge": self.merge})
        except ValueError as error:
            raise ValueError(f"{self.title}: {error}") from error

    @property
    def loras(self) -> tuple[LoraOptions, ...]:
        if self.lora is None:
            return ()
        lora = LoraOptions.parse(self.lora)
        return (replace(lora, path=ROOT / lora.path),)

    @property
    def merge(self) -> MergeOptions | None:
        return MergeOptions(ratio=self.ratio, **self.merged) if self.ratio else None

    def quantization(self, cali_ckpt: Path) -> QuantizationOptions | None:
        """Return the options by which the row reads its own cali_ckpt, or this one; None for a float model."""
        if self.weight_bit is None:
            return None
        if self.cali_ckpt is not None:
            cali_ckpt = ROOT / self.cali_ckpt
        quant_act = self.act_bit is not None
        return QuantizationOptions(
            cali_ckpt=cali_ckpt, weight_bit=self.weight_bit, quant_act=quant_act, act_bit=self.act_bit
        )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is calibrated, and how its pictures are drawn and scored.

    config: the model's yaml. prompts: "shapes" for captions, or a text with {class} for the classes of ImageNet.
    pictures: in a row. seed: of the first picture. drawing, calibration, scoring: see their classes; the model, the
    device, the folders, and what the rows differ in are still to be filled in. rows: of this model alone, and of
    the weights that come with it, after those of all models.
    """

    config: Path
    prompts: str
    pictures: int
    seed: int
    drawing: DrawOptions
    calibration: CalibrationOptions
    scoring: ScoringOptions
    rows: Sequence[Row] = ()

    def __post_init__(self) -> None:
        for name, low in (("pictures", 2), ("seed", 0)):
            check_whole(name, getattr(self, name), low)
        if self.prompts != "shapes" and "{class}" not in self.prompts:
            raise ValueError(f"prompts are {self.prompts!r}: they must be shapes or a text with {{class}}")


def read_table(path: Path) -> tuple[list[Row], dict[str, Protocol]]:
    """Return the rows, of which the first is the baseline, and a protocol for each model.

    Raises ValueError, with the name of the section, for a file that is no such table; OSError if it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_names("the table", content, ("rows", "models"), ("rows", "models"))
        rows = _rows(content["rows"], "row")
        protocols = {name: _protocol(values, name) for name, values in content["models"].items()}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {error}") from error
    if not rows or rows[0].weight_bit is not None or rows[0].ratio or rows[0].drawn:
        raise ValueError(
            f"table {str(path)!r}: its first row must be full precision without merging, drawn as the model says: the "
            "baseline"
        )
    for protocol in protocols.values():
        all_rows = [*rows, *protocol.rows]
        if len({row.key for row in all_rows}) < len(all_rows):
            raise ValueError(f"table {str(path)!r}: two rows have the same name and ratio, and are drawn alike")
    return rows, protocols


def _rows(values: Sequence[Mapping[str, Any]], where: str) -> list[Row]:
    return [build(Row, each, f"{where} {number}") for number, each in enumerate(values, 1)]


def choose_rows(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Return the baseline, which is the first row, and the rows with these keys; all rows if there are no keys.

    Raises ValueError for a key of no row.
    """
    known = {row.key: row for row in rows}
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"no row {', '.join(unknown)} in the table: it has {', '.join(known)}")
    return [row for row in rows if not keys or row is rows[0] or row.key in keys]


def _protocol(values: Mapping[str, Any], name: str) -> Protocol:
    """Return the protocol of the model `name`. Sections that are left empty have the defaults of their classes."""
    plain = {each.name for each in fields(Protocol)}
    required = ("config", "prompts", "pictures", "seed", "drawing")
    check_names(f"model {name}", values, (*plain, "reference"), required)
    sections = {part: values.get(part) or {} for part in ("drawing", "calibration", "scoring")}
    reserved = {"drawing": DRAWN_ELSEWHERE, "calibration": CALIBRATED_ELSEWHERE, "scoring": SCORED_ELSEWHERE}
    for part, section in sections.items():
        if not isinstance(section, Mapping):
            raise ValueError(f"{part} of {name} is {section!r}: it must be names with values")
        if taken := [key for key in section if key in reserved[part]]:
            raise ValueError(f"{part} of {name} has {', '.join(taken)}, which the rows and the command say")
    calibration, scoring = {**sections["calibration"], **W4A8}, dict(sections["scoring"])
    if values.get("reference") is not None:
        scoring["reference"] = values["reference"]
    return Protocol(
        config=ROOT / values["config"],
        prompts=values["prompts"],
        pictures=values["pictures"],
        seed=values["seed"],
        drawing=build(DrawOptions, sections["drawing"], f"drawing of {name}"),
        calibration=build(CalibrationOptions, calibration, f"calibration of {name}"),
        scoring=build(ScoringOptions, scoring, f"scoring of {name}"),
        rows=_rows(values.get("rows") or (), f"{name}, row"),
    )


# --- plain values to options -------------------------------------------------------------------------------


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return an object of the dataclass `kind` from plain values, those of its dataclasses included.

    where: names the place in messages. Raises ValueError for names that are unknown or missing, for values of another
    type than the field's, and for what the class itself refuses.
    """
    assert is_dataclass(kind), f"{kind} must be a dataclass"
    known = {each.name: each for each in fields(kind)}
    required = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    check_names(where, values, tuple(known), required)
    hints = get_type_hints(kind)
    typed = {name: _typed(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_names(where: str, values: object, known: Sequence[str], required: Sequence[str]) -> None:
    """Raise ValueError if `values` is no mapping, has a name that is not known, or lacks one that is required."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}: it must be names with values")
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"{where} has unknown {', '.join(unknown)}: it takes {', '.join(sorted(known))}")
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a value of YAML as the type of a field has it. Raises ValueError if it is of another type."""
    kinds: tuple[type[Any], ...] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if _is_options(kind) and isinstance(value, Mapping):
            return build(kind, value, where)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("empty" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ValueError(f"{where} is {value!r}: it must be of type {names}")


def _is_options(kind: type[Any]) -> bool:
    return is_dataclass(kind)
