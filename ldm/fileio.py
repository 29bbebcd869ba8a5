"""Write files atomically, hash them, check where they can be written, and read JSON."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.messages import first_line

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

PIECE = 32 * 2**20  # bytes of a file that are hashed at a time
_hashes: dict[tuple[Path, int, int], str] = {}  # by path, size and time of change
_hashing = threading.Lock()  # one file at a time, whichever thread asks


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
        with write_errors_naming(path, temporary):
            write(temporary)
            _allow_as_usual(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _allow_as_usual(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes its files readable by the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def write_errors_naming(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise what a library raises when it cannot write, on a full disk say, as an OSError that names `path`.

    temporary: the name under which `path` is written. Errors about other files stay as they are.
    """
    try:
        yield
    except Exception as error:
        number, reason = _write_failure(error, temporary)
        if reason is None:
            raise
        raise OSError(number, reason, str(path)) from error


def _write_failure(error: Exception, temporary: Path | None) -> tuple[int, str | None]:
    """Return the number and the text of an error of writing; the text is None for an error that is none."""
    if isinstance(error, OSError):
        about_it = error.filename is None or (temporary is not None and str(error.filename) == str(temporary))
        return error.errno or errno.EIO, (error.strerror or str(error)) if about_it else None
    number = re.search(r"\(os error (\d+)\)", str(error))  # the errors of safetensors
    if number is not None:
        return int(number[1]), os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # those of torch.save, which tell no more
        return errno.EIO, "cannot be written (is the disk full?)"
    return 0, None


def write_folder_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` with a new folder, then rename it to `path`: complete or not there.

    Its files get the permissions of any new file. The temporary folder lies beside `path`, is hidden, and does not
    survive an error. Parents are created.
    Raises ValueError if `path` is a file, or a folder with content.
    """
    path = Path(path)
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with write_errors_naming(path, temporary):
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _allow_as_usual(file)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raise ValueError if `path` is a file, or a folder with content."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there already: give the name of a new folder")


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder within the block.

    The folder is created if need be, and removed again if nothing is in it at the end. The lock is the system's, on the
    folder itself: no file tells of it, and it ends with the process, however that ends. Systems and network disks
    without such locks keep nobody out. Raises ValueError if another run is in it.
    """
    places = (Path(folder), *Path(folder).parents)
    created = [place for place in places if not place.exists()]
    try:
        handle = _lock(Path(folder))
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)
    finally:
        with suppress(OSError):  # it holds something
            for place in created:
                place.rmdir()


def _lock(folder: Path) -> int | None:
    """Make a folder, lock it, and return what closing unlocks; None where there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"another run is writing to {str(folder)!r}: wait for its end, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                os.close(handle)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        os.close(handle)  # a run that ended just now has removed the folder: it is made anew


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
    key = (resolved, status.st_size, status.st_mtime_ns)
    with _hashing:  # one that is being hashed ahead is waited for
        if key not in _hashes:
            _hashes[key] = _sha256(resolved)
        return _hashes[key]


def hash_ahead(paths: Sequence[Path]) -> None:
    """Begin to hash files in a thread, for `file_sha256` to be asked later; it tells of files that cannot be read.

    It is worth its while before the libraries are imported, which keeps one core busy.
    """

    def hash_all() -> None:
        for path in paths:
            with suppress(OSError):
                file_sha256(path)

    threading.Thread(target=hash_all, daemon=True, name="hash ahead").start()


def _sha256(path: Path) -> str:
    # In large pieces, since between two of them an import in another thread may keep the interpreter for itself.
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(PIECE, max(path.stat().st_size, 2**16))))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(piece[:read])
    return digest.hexdigest()


def json_object(text: str) -> dict[str, Any]:
    """Return the object that a JSON text holds. Raises ValueError, in one line, for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, no object")
    return content
