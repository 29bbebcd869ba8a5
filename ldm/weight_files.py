"""Read files of weights, in every format in which they are published. No code in a file is run.

Files are memory-mapped, where their format allows it: a tensor costs no memory until it is used.
"""

import functools
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.messages import first_line, some
from ldm.tensor_files import LARGEST_HEADER, check_whole

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
ZIP_MAGIC = b"PK\x03\x04"
# The begin of a file of torch before 1.6: a pickle of torch's magic number. OLD_PICKLES pickles stand before the data.
OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
OLD_PICKLES = 5
LARGEST_PICKLE = 64 * 2**20  # bytes, see LARGEST_HEADER

# Packages whose classes training stores beside the weights: callbacks, settings, scalars. When a file is read,
# stand-ins replace them.
HARMLESS_PACKAGES = frozenset({"pytorch_lightning", "lightning", "omegaconf", "numpy", "typing"})
HARMLESS_TYPES = frozenset(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple"))
DEFAULT_DICT = "collections.defaultdict"
TENSOR_PARTS = ("torch.", "collections.OrderedDict", "_codecs.encode")  # in old files; torch checks these itself


class _StandIn:
    """Replace an object of a pickle that we do not need: accept its state and ignore it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict:
    """Return a plain dict in place of a defaultdict, for the unpickler to fill."""
    return {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .ckpt, .pt, .pth, .bin (torch) or .safetensors file by name, on the CPU.

    The file's content decides which format it is, not its name. Files are memory-mapped; but not those of torch before
    1.6, nor a zip that is named .safetensors. If the file holds a `state_dict`, its tensors are returned. Entries that
    are no tensors, or have no string as their key, are left out.

    Raises FileNotFoundError for a missing path. Raises ValueError, in one line, for a directory, another kind of
    file, an empty, truncated or corrupt file, a file without tensors, and a pickle that refers to unknown code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file: give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise ValueError(f"checkpoint {str(path)!r} is empty")
    tensors = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not tensors:
        raise ValueError(f"checkpoint {str(path)!r} holds no tensors")
    return tensors


def _is_safetensors(path: Path) -> bool:
    """Tell safetensors (True) from a file of torch (False) by the first bytes, or else by the suffix.

    Raises ValueError if neither content nor suffix is that of a checkpoint, and for a header that is too large.
    """
    with path.open("rb") as file:
        start = file.read(len(OLD_MAGIC))
    if start.startswith(ZIP_MAGIC) or start == OLD_MAGIC:
        return False
    if start[8:9] == b"{":  # the header, in JSON, after its length in 8 bytes
        if int.from_bytes(start[:8], "little") > LARGEST_HEADER:
            raise ValueError(f"checkpoint {str(path)!r} has a header of more than {LARGEST_HEADER >> 20} MB: refused")
        return True
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        suffixes = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise ValueError(f"{str(path)!r} is no known kind of checkpoint: its name must end in {suffixes}")
    return path.suffix == SAFETENSORS_SUFFIX


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the facts in a file's header, as `save_checkpoint` writes them; empty for files of torch and folders.

    Raises ValueError for a file that cannot be read.
    """
    if Path(path).is_dir() or not _is_safetensors(Path(path)):
        return {}
    with _opened(Path(path)) as file:
        return file.metadata() or {}


def has_mark(path: str | Path, name: str) -> bool:
    """Tell whether a .safetensors has an entry `name`, from its header; False for files of torch and folders.

    Raises ValueError for a file that cannot be read.
    """
    if Path(path).is_dir() or not _is_safetensors(Path(path)):
        return False
    with _opened(Path(path)) as file:
        return name in file.keys()  # noqa: SIM118 (not a mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a .safetensors within the block. Raises ValueError, in one line, for what cannot be read of it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except Exception as error:  # the library has its own exception type beside OSError
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    check_whole(path)
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)
    if not zipped and not _is_old(path):
        raise ValueError(f"checkpoint {str(path)!r} is corrupt, truncated, or no torch zip file")
    if zipped:
        _check_archive(path)
    try:
        classes = get_unsafe_globals_in_checkpoint(str(path)) if zipped else list(_old_classes(path))
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise _unreadable(path, error) from error
    foreign = sorted(name for name in classes if not _is_harmless(name))
    if foreign:
        raise ValueError(f"checkpoint {str(path)!r} wants to run code ({some(foreign)}): refused")
    try:
        with safe_globals([(_empty_dict if name == DEFAULT_DICT else _StandIn, name) for name in classes]):
            content = _load_torch(path, mapped=zipped)
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, not named tensors")
    named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: value.detach() for name, value in named.items()}


def _check_archive(path: Path) -> None:
    """Raise ValueError for a zip that would unpack to more than it is, or whose content is not as it was written."""
    status = path.stat()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # whatever a damaged archive leads to
        raise _unreadable(path, error) from error
    if sum(entry.file_size for entry in entries) > status.st_size:
        raise ValueError(f"checkpoint {str(path)!r} is compressed, or overlaps itself: torch writes no such files")
    pickles = [entry.file_size for entry in entries if entry.filename.endswith("data.pkl")]
    if max(pickles, default=0) > LARGEST_PICKLE:
        raise ValueError(f"checkpoint {str(path)!r} has a pickle of more than {LARGEST_PICKLE >> 20} MB: refused")
    damaged = _damaged_entry(path.resolve(), status.st_size, status.st_mtime_ns)
    if damaged is not None:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: the checksum of {damaged!r} is wrong")


@functools.cache
def _damaged_entry(path: Path, size: int, mtime_ns: int) -> str | None:
    """Return the name of the first entry of a zip whose checksum is wrong; None for a whole file.

    A file is read once, as long as `size` and `mtime_ns` are the same. torch can write files without checksums, where
    all are wrong: these count as whole.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        wrong = [name for name in names if not _is_whole(archive, name)]
    return wrong[0] if wrong and len(wrong) < len(names) else None


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as file:
            while file.read(2**24):
                pass
    except Exception:  # a wrong checksum, or a place that is not in the file
        return False
    return True


def _is_old(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(OLD_MAGIC)) == OLD_MAGIC


def _load_torch(path: Path, mapped: bool) -> Any:
    if mapped and path.suffix != SAFETENSORS_SUFFIX:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:  # given this name, torch.load would expect safetensors; a file object is not mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def _old_classes(path: Path) -> Iterator[str]:
    """Yield the names of classes and functions in a file of torch before 1.6, without those that make tensors.

    The pickles are listed, and not run. torch itself refuses what is harmful of its own, and other ways to name code.
    """
    with path.open("rb") as file:
        for _ in range(OLD_PICKLES):
            yield from (name for name in _globals(file) if not name.startswith(TENSOR_PARTS))


def _globals(file: BinaryIO) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("GLOBAL", "INST"):
            yield re.sub(r"^__builtin__\b", "builtins", str(argument).replace(" ", "."))  # as Python 2 called them
        elif operation.name == "STACK_GLOBAL":
            yield "a name that is computed"


def _is_harmless(name: str) -> bool:
    return name.split(".")[0] in HARMLESS_PACKAGES or name in {*HARMLESS_TYPES, DEFAULT_DICT}


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint {str(path)!r} cannot be read, it is corrupt or truncated: {first_line(error)}")
