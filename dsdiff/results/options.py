"""The options of the table of results. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsdiff.checks import check_whole
from dsdiff.models.registry import CONFIGS, ROOT

TABLE = ROOT / "configs/eval/table.yaml"
MODELS = tuple(CONFIGS)


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """How the table of results is made. None leaves a value to the table, or to the model.

    model: the name of a model in the table. table: its file. rows: keys of the rows that are made, such as "W4A8-0.5",
    beside the baseline; none stands for all. pictures: in a row. reference: the source of real pictures, see
    `dsdiff.metrics.options`. ckpt, tokenizer: of the model. cali_ckpt: a calibration of 4-bit weights and 8-bit
    activations; None takes the one that comes with the model, or makes one. inception_weights: a file. outdir: for all
    files. cache: the folder of features. batch_size: pictures drawn at a time. repeats: of timings. shown: prompts
    whose pictures are in the page. device: auto, cpu, cuda or cuda:N.
    """

    model: str = MODELS[0]
    table: Path = TABLE
    rows: Sequence[str] = ()
    pictures: int | None = None
    reference: str | None = None
    ckpt: Path | None = None
    tokenizer: Path | None = None
    cali_ckpt: Path | None = None
    inception_weights: Path | None = None
    outdir: Path = Path("outputs/results")
    cache: Path = Path("outputs/fid-cache")
    batch_size: int = 16
    repeats: int = 5
    shown: int = 6
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("pictures", 2), ("batch_size", 1), ("repeats", 1), ("shown", 1)):
            check_whole(name, getattr(self, name), low, optional=True)
