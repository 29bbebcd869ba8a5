"""configs/eval/table.yaml: the rows of the table of results, and how each model is drawn and scored."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

import tomesd
from dsdiff.pipeline import ROOT

MODEL_FLAGS = ("--config", "--ckpt", "--tokenizer", "--device")
ROW_FLAGS = ("--ratio", "--ptq", "--cali_ckpt", "--weight_bit", "--quant_act", "--no-quant_act", "--act_bit")
RUN_FLAGS = ("--seed", "--n_samples", "--n_iter", "--outdir")
TABLE = ROOT / "configs/eval/table.yaml"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to run a model. weight_bit, act_bit: None for float. published: the FID of the original work, of theirs."""

    name: str
    ratio: float
    weight_bit: int | None = None
    act_bit: int | None = None
    published: float | None = None

    def __post_init__(self) -> None:
        if self.ratio:
            tomesd.MergeOptions(ratio=self.ratio)
        if self.weight_bit is None and self.act_bit is not None:
            raise ValueError(f"{self.name}: activations of {self.act_bit} bits need a weight_bit")

    @property
    def title(self) -> str:
        return f"{self.name}, ratio {self.ratio:g}"

    @property
    def flags(self) -> list[str]:
        """Of txt2img.py, but for the --cali_ckpt."""
        flags = ["--ratio", str(self.ratio)] if self.ratio else []
        if self.weight_bit is not None:
            flags += ["--ptq", "--weight_bit", str(self.weight_bit)]
            flags += ["--no-quant_act"] if self.act_bit is None else ["--quant_act", "--act_bit", str(self.act_bit)]
        return flags

    @property
    def key(self) -> str:
        """A name for a folder."""
        return f"{self.name}-{self.ratio:g}"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is calibrated, and its pictures are drawn and scored: see configs/eval/table.yaml."""

    config: str
    prompts: str
    pictures: int
    seed: int
    drawing: list[str]
    calibration: list[str]
    reference: str | None
    scoring: list[str]

    def __post_init__(self) -> None:
        for name in ("drawing", "calibration", "scoring"):
            flags = getattr(self, name)
            if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
                raise ValueError(f"{name} is {flags!r}: it must be a list of texts, numbers in quotes")
        set_elsewhere = (*MODEL_FLAGS, *ROW_FLAGS, *RUN_FLAGS)
        if idle := [flag for flag in self.drawing if flag.split("=")[0] in set_elsewhere]:
            raise ValueError(f"drawing has {', '.join(idle)}, which the rows and the command say")
        if self.prompts != "shapes" and "{class}" not in self.prompts:
            raise ValueError(f"prompts are {self.prompts!r}: they must be shapes or a text with {{class}}")


def read_table(path: Path) -> tuple[list[Row], dict[str, Protocol]]:
    """Rows, the first of which is the baseline, and a protocol a model. ValueError for what is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = [_built(Row, row) for row in content["rows"]]
        protocols = {name: _built(Protocol, protocol) for name, protocol in content["models"].items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {error}") from error
    if not rows or rows[0].weight_bit is not None or rows[0].ratio:
        raise ValueError(f"table {str(path)!r}: its first row must be full precision without merging, the baseline")
    if len({row.key for row in rows}) < len(rows):
        raise ValueError(f"table {str(path)!r}: two rows have the same name and ratio")
    return rows, protocols


def _built(kind: type, values: Mapping[str, Any]) -> Any:
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__.lower()} {values.get('name', '')} has unknown {', '.join(unknown)}")
    return kind(**values)
