"""Write .safetensors with a checksum of all that they hold, and check those that have one.

The format has none of its own: a bit that a disk or a copy turned over would be another weight, and nobody would know.
Other programs read these files as any other, and see the checksum as a fact in the header.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

METADATA, ENTRY = "__metadata__", "dsdiff_check"  # of the header: the facts, and the checksum in them
EMPTY = "0" * 64  # stands for the checksum until it is known
BLOCK, BLOCKS = 2**16, 16  # bytes that one sum is of; sums computed at a time, whose bytes fit into a cache
# What describes the tensors of a file is small beside them. A larger one is an attack on the memory of its reader.
LARGEST_HEADER = 16 * 2**20

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors; the same tensors and metadata give the same bytes.

    The file is not written atomically: `ldm.fileio.write_atomically` gives the `path`. Raises ValueError for a type of
    numbers that the format does not have.
    """
    # Wide numbers come first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA: {**dict(sorted((metadata or {}).items())), ENTRY: EMPTY}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} holds {tensor.dtype}, which a .safetensors of this program cannot")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    with open(path, "wb+") as file:
        file.write(_encoded(header))
        for name in names:
            file.write(_bytes(tensors[name]))
        file.seek(len(_encoded(header)))
        header[METADATA][ENTRY] = _check_sum(header, file)
        file.seek(0)
        file.write(_encoded(header))


def check_whole(path: str | Path) -> None:
    """Raise ValueError for a .safetensors that holds something else than `save_tensors` wrote.

    Nothing is said of a file without a checksum, or with an unreadable header. A file is read once in a process, as
    long as its size and its time of change are the same.
    """
    resolved = Path(path).resolve()
    status = resolved.stat()
    if _is_damaged(resolved, status.st_size, status.st_mtime_ns):
        raise ValueError(f"{str(path)!r} is damaged, or was changed by another program: its checksum is wrong")


@functools.cache
def _is_damaged(path: Path, size: int, mtime_ns: int) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, LARGEST_HEADER):
            return False
        try:
            header = json.loads(file.read(length))
            told = header[METADATA][ENTRY]
        except (ValueError, RecursionError, KeyError, TypeError):
            return False
        return told != _check_sum(header, file)


def _check_sum(header: Mapping[str, Any], file: BinaryIO) -> str:
    """Return a hash of the header, without its checksum, and of the sums of all blocks from where `file` stands.

    A sum of 64-bit words costs a tenth of a hash of their bytes. It tells any bit that was turned over, and any hole.
    """
    facts = {name: value for name, value in header[METADATA].items() if name != ENTRY}
    digest = hashlib.sha256(json.dumps({**header, METADATA: facts}, sort_keys=True).encode())
    for sums in _block_sums(file):
        digest.update(sums)
    return digest.hexdigest()


def _block_sums(file: BinaryIO) -> Iterator[bytes]:
    """Yield the sums of blocks of BLOCK bytes, modulo 2^64, several at a time. The last block is filled with zeros."""
    buffer = bytearray(BLOCK * BLOCKS)
    words = np.frombuffer(buffer, dtype="<u8").reshape(BLOCKS, -1)
    while read := file.readinto(buffer):  # type: ignore[attr-defined]
        buffer[read:] = bytes(len(buffer) - read)
        yield words[: -(-read // BLOCK)].sum(1, dtype="<u8").tobytes()


def _encoded(header: Mapping[str, Any]) -> bytes:
    """Return the begin of a file: the length of the header in 8 bytes, and the header, filled up to a multiple of 8."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
