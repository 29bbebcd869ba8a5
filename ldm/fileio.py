"""Writing files so that they are complete or not there."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, then rename to `path`; with the permissions of any new file.

    Raises FileNotFoundError if the folder is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(2, "No such directory", str(path.parent))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Raise OSError or ValueError if `directory` cannot be made, or nothing can be written to it. Leaves no trace."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write to {str(directory)!r}: {str(existing)!r} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {str(directory)!r}: {error.strerror}; choose another --outdir") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
