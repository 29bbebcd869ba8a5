"""Keep the finished steps of a calibration on disk, so that it can be resumed after a kill."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.fileio import json_object, write_atomically
from ldm.tensor_files import check_whole, save_tensors

logger = logging.getLogger(__name__)

LAYOUT, VERSION = "layout", 2  # of the steps in the folder: those of other versions cannot be gone on with


class ProgressFolder:
    """A folder with a file for each finished step of a calibration, and the settings that it was begun with.

    Files are written atomically. A step holds the ranges of all weights, a unit's weights, the ranges of all
    activations, or a unit's step sizes. Steps are numbered from 0 in their order; a step is used again only if all
    steps before it are there.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def begun(self) -> bool:
        """True if a calibration was begun in this folder."""
        return (self.folder / "settings.json").exists()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin a new calibration: remove what is there, and write its settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("step-*"):
            path.unlink()
        content = json.dumps({LAYOUT: VERSION, **settings}, indent=2)
        write_atomically(self.folder / "settings.json", lambda path: path.write_text(content))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the differences, unless the calibration here was begun with these settings."""
        try:
            old = flat(json.loads((self.folder / "settings.json").read_text()))
            new = flat({LAYOUT: VERSION, **settings})
            differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"the calibration in {str(self.folder)!r} cannot be resumed: {error}; remove it to begin anew"
            ) from error
        if differ:
            what = ", ".join(f"{name} ({old.get(name)} there, {new.get(name)} here)" for name in differ[:3])
            raise ValueError(
                f"the calibration in {str(self.folder)!r} was begun with other settings: {what}; give the same, or "
                "another --outdir"
            )

    def save(self, number: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Write step `number`."""
        metadata = {"report": json.dumps(dict(report))}
        write_atomically(self._path(number), lambda path: save_tensors(tensors, path, metadata))

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file beside the steps."""
        text = json.dumps(content)
        write_atomically(self.folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return what `keep` wrote under this name; None if it is not there, or damaged."""
        try:
            return json_object((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the report of step `number`, None if it is not finished or its file is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            check_whole(path)
            with safe_open(path, framework="pt") as file:
                report = json.loads((file.metadata() or {})["report"])
                return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s is damaged: what it held, and all after it, is done anew (%s)", path, error)
            return None

    def drop_from(self, number: int) -> None:
        """Remove the steps from `number` on: they followed a step that is done anew."""
        for path in self.folder.glob("step-*"):
            if path >= self._path(number):
                path.unlink()

    def remove(self) -> None:
        """Remove the calibration and its folder."""
        for path in sorted(self.folder.glob("*"), reverse=True):  # steps before settings
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()

    def finished(self) -> int:
        """Return the number of finished steps."""
        number = 0
        while self._path(number).exists():
            number += 1
        return number

    def _path(self, number: int) -> Path:
        return self.folder / f"step-{number:04}.safetensors"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the entries of mappings within mappings under their whole names: {"a": {"b": 1}} becomes {"a.b": 1}.

    An empty mapping is left out, as if it were not there.
    """
    entries: dict[str, Any] = {}
    for name, value in values.items():
        entries |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return entries
