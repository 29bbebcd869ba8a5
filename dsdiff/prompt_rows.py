"""Rows of prompts: a file in JSON lines, whose lines may have settings of their own."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsdiff.checks import check_whole, is_whole
from dsdiff.options import DrawOptions
from ldm.fileio import json_object

SUFFIXES = (".jsonl", ".ndjson")  # of files in JSON lines; others hold a prompt in each line
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt, and what of the settings is its own; None is as for all.

    negative: the negative prompt. seed: of its picture, in the first round; each further round adds one. steps, scale:
    of sampling and of guidance. size: width and height in pixels. line: its number in the file, from 1.
    Raises ValueError, in a line, for a value of another kind.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    scale: float | None = None
    size: tuple[int, int] | None = None
    line: int

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0, MAX_SEED, optional=True)
        check_whole("steps", self.steps, 1, optional=True)
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt is {self.prompt!r}: it must be a text")
        if self.negative is not None and not isinstance(self.negative, str):
            raise ValueError(f"negative is {self.negative!r}: it must be a text")
        if self.scale is not None and (isinstance(self.scale, bool) or not isinstance(self.scale, int | float)):
            raise ValueError(f"scale is {self.scale!r}: it must be a number")
        if self.size is not None and not (len(self.size) == 2 and all(is_whole(n) and n >= 1 for n in self.size)):
            raise ValueError(f'size is {list(self.size)}: it must be [width, height] or "WIDTHxHEIGHT", in pixels')

    @property
    def own(self) -> dict[str, Any]:
        """The settings that the row has of its own, as plain values."""
        names = [each.name for each in fields(self) if each.name not in ("prompt", "line")]
        values = {name: getattr(self, name) for name in names}
        values["size"] = None if self.size is None else list(self.size)
        return {name: value for name, value in values.items() if value is not None}

    def options(self, common: DrawOptions) -> DrawOptions:
        """Return the options of the row's picture. Raises ValueError as DrawOptions does."""
        width, height = (None, None) if self.size is None else self.size
        own = {
            "negative_prompt": self.negative,
            "steps": self.steps,
            "scale": self.scale,
            "width": width,
            "height": height,
        }
        return replace(common, **{name: value for name, value in own.items() if value is not None})


def has_rows(path: Path | None) -> bool:
    """Return True for a file in JSON lines, by its name."""
    return path is not None and path.suffix.lower() in SUFFIXES


def read_rows(path: Path, flag: str) -> tuple[Row, ...]:
    """Return the rows of a file in JSON lines; empty lines are left out.

    A line is {"prompt": TEXT} with any of "negative", "seed", "steps", "scale" and "size" beside it. flag: names the
    file in messages. Raises ValueError, with the number of the line, for a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {str(path)!r} is no UTF-8 text: {error}") from error
    rows = []
    for i, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_row(line, i))
            except ValueError as error:
                raise in_line(error, path, i, flag) from error
    if not rows:
        raise ValueError(f'{flag} {str(path)!r} holds no rows: write one per line, such as {{"prompt": "a circle"}}')
    return tuple(rows)


def in_line(error: ValueError, path: Path, line: int, flag: str) -> ValueError:
    """Return the error with the file and the line before it."""
    return ValueError(f"{flag} {str(path)!r}, line {line}: {error}")


def _row(text: str, line: int) -> Row:
    content = json_object(text)
    known = [each.name for each in fields(Row) if each.name != "line"]
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown: a row has {', '.join(known)}")
    if "prompt" not in content:
        raise ValueError("there is no prompt")
    values = {name: value for name, value in content.items() if value is not None}
    return Row(**(values | {"prompt": content["prompt"], "size": _size(content.get("size")), "line": line}))


def _size(value: Any) -> tuple[int, int] | None:
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", value) if isinstance(value, str) else None
    if match:
        return int(match[1]), int(match[2])
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f'size is {value!r}: it must be [width, height] or "WIDTHxHEIGHT", in pixels')
    return tuple(value)  # which Row checks
