"""Figures of quality that another run has measured, on a GPU say, beside times that are measured here."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdiff.metrics.attributes import Share
from dsdiff.results.frontier.figures import Costs, Eps, Pictures

QUALITY = {"eps": Eps, "pictures": Pictures, "attributes": Share}  # a row's figures beside time


def read_comparisons(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the comparisons that a run wrote to `path` by `report.write`, one for each number of steps.

    Raises FileNotFoundError, or ValueError for another file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
        return [
            {name: each[name] for name in ("model", "drawing", "n", "seed", "machine")}
            | {"rows": {row["name"]: {"changes": row["changes"], **_figures(row)} for row in each["rows"]}}
            for each in found
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--quality {str(path)!r} is no JSON file of this command: {error!r}") from error


def matching(
    comparisons: Sequence[Mapping[str, Any]], model: str, drawing: Mapping[str, Any], source: str
) -> Mapping[str, Any]:
    """Return the comparison of this model whose base is drawn so. Raises ValueError, which names the source."""
    for each in comparisons:
        if (_without_folders(each["model"]), _plain(each["drawing"])) == (_without_folders(model), _plain(drawing)):
            return each
    raise ValueError(
        f"--quality {source!r} has no figures of {_without_folders(model)} drawn as here, with {_plain(drawing)}: "
        "give the flags with which it was measured"
    )


def joined(costs: Costs, other: Mapping[str, Any]) -> Costs:
    """Return the costs with the other run's figures of quality where they have none themselves.

    Its rows count where they do what the row of that name does. n and seed become those of its prompts.
    """
    rows = []
    for row in costs.rows:
        found = other["rows"].get(row.name, {})
        alike = _plain(found.get("changes")) == _plain(row.changes)
        figures = {
            name: figure for name, figure in found.items() if alike and name in QUALITY and getattr(row, name) is None
        }
        rows.append(replace(row, **figures))
    return replace(costs, rows=rows, n=other["n"], seed=other["seed"], quality_of=other["machine"])


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's figures of quality, without those that were not measured."""
    return {name: kind(**row[name]) for name, kind in QUALITY.items() if row.get(name) is not None}


def _without_folders(model: str) -> str:
    """Return a model's description with the names of files alone: their folders differ from machine to machine."""
    return re.sub(r"\([^()]*/", "(", model)


def _plain(value: Any) -> str:
    """Return a value as JSON has it, in which tuples are lists."""
    return json.dumps(value, sort_keys=True, default=str)
