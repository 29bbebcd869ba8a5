"""Write files atomically, hash them, and check where they can be written."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, then rename the temporary file to `path`, so that it appears complete or not at all.

    The file gets the permissions of any new file. The temporary file lies beside `path`, is hidden, and does not
    survive an error. Raises FileNotFoundError if the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(2, "No such directory", str(path.parent))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors makes its files readable by the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(directory: str | Path) -> None:
    """Raise ValueError if `directory` cannot be created, or no file can be written to it. Leaves no trace."""
    directory = Path(directory)
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot write to {str(directory)!r}: {str(existing)!r} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {str(directory)!r}: {error.strerror}; choose another folder") from error


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    The result is remembered while the process runs, for a file of the same path, size and time of change: a large
    checkpoint is read once. Raises OSError for a file that cannot be read.
    """
    resolved = Path(path).resolve()
    status = resolved.stat()
    return _sha256(resolved, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash the file at `path`; `size` and `mtime_ns` make a changed file another entry of the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
