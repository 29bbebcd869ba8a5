"""Whether what stands in a folder is whole: every file under its final name can be read to its end."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from PIL import Image
from safetensors import safe_open

from ldm.tensor_files import check_whole


def _read_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _read_tensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            file.get_tensor(name)
    check_whole(path)


def _read_csv(path: Path) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        list(csv.reader(file))


READERS: Mapping[str, Callable[[Path], object]] = {
    ".png": _read_picture,
    ".safetensors": _read_tensors,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".yaml": lambda path: yaml.safe_load(path.read_text(encoding="utf-8")),
    ".csv": _read_csv,
}


def broken_files(folder: Path) -> list[str]:
    """Return the names of the files that cannot be read. Hidden ones, which are being written, do not count."""
    broken = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        try:
            READERS.get(path.suffix, Path.read_bytes)(path)
        except Exception as error:  # whatever its reader raises
            broken.append(f"{path.relative_to(folder)} ({type(error).__name__})")
    return broken


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files and folders, which a run that came to its end in order must not leave."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
