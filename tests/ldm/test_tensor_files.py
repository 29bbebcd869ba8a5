"""Files of tensors with a checksum: as safetensors reads them, and every damage that it does not see."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import tensor_files
from ldm.checkpoint import read_weights
from ldm.tensor_files import BLOCK, ENTRY, check_whole, save_tensors


def examples() -> dict[str, torch.Tensor]:
    """Return tensors of all types, shapes and strides; of more than one block of sums, and no multiple of one."""
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in tensor_files.TYPES}
    return tensors | {
        "none": torch.zeros(0, 3),
        "a number": torch.tensor(0.5),
        "transposed": torch.randn(4, 6, dtype=torch.bfloat16).T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "large": torch.randn(BLOCK * 20 // 4 + 7),
    }


def test_safetensors_reads_what_was_written(tmp_path):
    path, facts = tmp_path / "a.safetensors", {"z": "1", "a": "Ü\n"}
    save_tensors(examples(), path, facts)
    found = load_file(path)
    for name, tensor in examples().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert found.keys() == examples().keys()
    with safe_open(path, "pt") as file:
        assert {name: value for name, value in file.metadata().items() if name != ENTRY} == facts
    check_whole(path)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    contents = []
    for tensors, facts in (
        (examples(), {"a": "1", "b": "2"}),
        (dict(reversed(examples().items())), {"b": "2", "a": "1"}),
    ):
        save_tensors(tensors, tmp_path / "a.safetensors", facts)
        contents.append((tmp_path / "a.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_every_damage_is_noticed(tmp_path):
    """Bits of the data and of facts, a hole of zeros, exchanged blocks, another number of the header."""
    whole, path, chance = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors", random.Random(0)
    save_tensors(examples(), whole, {"scale": "0.18215"})
    content = whole.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    at = content.index(b"0.18215")
    damaged = {"scale": content[: at + 6] + b"7" + content[at + 7 :]}
    for _ in range(50):
        bit = chance.randrange(8 * start, 8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged[f"bit {bit}"] = bytes(flipped)
    hole = chance.randrange(start, len(content) - 512)
    damaged["hole"] = content[:hole] + bytes(512) + content[hole + 512 :]
    block, other = (content[start + i * BLOCK : start + (i + 1) * BLOCK] for i in (2, 3))
    damaged["exchanged"] = content.replace(block + other, other + block)
    for what, data in damaged.items():
        path.write_bytes(data)
        assert data != content and load_file(path).keys() == examples().keys(), what
        for read in (check_whole, read_weights):
            with pytest.raises(
                ValueError, match=r"damaged\.safetensors' is damaged, or was changed by another program: its checksum"
            ):
                read(path)


def test_files_without_a_check_sum_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(3)}, path, metadata=metadata)
        check_whole(path)
        assert read_weights(path)["a"].tolist() == [1, 1, 1], metadata
    for content in (
        b"",
        b"\x05",
        (2**63).to_bytes(8, "little") + b"{}",
        b"\x02" + bytes(7) + b"[]",
        b"\x03" + bytes(7),
    ):
        path.write_bytes(content)
        check_whole(path)  # the loader tells what such a file lacks


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path, reads = tmp_path / "a.safetensors", []
    save_tensors({"a": torch.ones(3)}, path)
    own = tensor_files._check_sum
    monkeypatch.setattr(tensor_files, "_check_sum", lambda *args: reads.append(1) or own(*args))
    for _ in range(3):
        check_whole(path)
    assert len(reads) == 1
    save_tensors({"a": torch.ones(4)}, path)
    reads.clear()
    check_whole(path)
    assert len(reads) == 1


def test_other_types_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'?b'? holds torch\.complex64"):
        save_tensors({"b": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_header_is_aligned(tmp_path):
    for length in range(9):
        path = tmp_path / f"{length}.safetensors"
        save_tensors({"a": torch.ones(2)}, path, {"x": "y" * length})
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        assert size % 8 == 0 and json.loads(content[8 : 8 + size])["a"]["data_offsets"] == [0, 8], length
