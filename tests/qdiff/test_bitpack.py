"""Packed codes against bytes worked by hand, and against Python's own integers."""

import math

import torch

from qdiff.bitpack import pack, packed_bytes, unpack

BITS = range(2, 17)
# Odd row lengths, whole octets, a single code, a single row, and no codes beside the rows.
SHAPES = [(5, 7), (3, 2, 3, 3), (4, 16), (1, 1), (2, 9), (1, 24), (6,)]


def some_codes(shape, n_bits):
    """Random codes, the lowest and the highest among them."""
    generator = torch.Generator().manual_seed(n_bits)
    codes = torch.randint(0, 2**n_bits, shape, generator=generator)
    codes.view(-1)[0], codes.view(-1)[-1] = 2**n_bits - 1, 0
    return codes


def bytes_of(row, n_bits):
    """A row's bytes: its codes as the digits of one number, the first the least significant."""
    width = n_bits if n_bits <= 8 else 16
    number = sum(code << (width * i) for i, code in enumerate(row))
    count = len(row) if n_bits >= 8 else 8 * math.ceil(len(row) / 8)  # narrow ones are filled up to eight
    return list(number.to_bytes(width * count // 8, "little"))


def test_four_bits_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 0, 15, 9, 0, 0, 12]])
    expected = [[0x21, 0x43, 0x65, 0x87], [0x0F, 0xF0, 0x09, 0xC0]]
    assert pack(codes, 4).tolist() == expected


def test_three_bits_by_hand():
    # 111 110 101 100 011 010 001 000, from c7 down to c0, cut into bytes from the right.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert pack(codes, 3).tolist() == [[0b10001000, 0b11000110, 0b11111010]]


def test_two_bits_by_hand():
    assert pack(torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]]), 2).tolist() == [[0b11100100, 0b00011011]]


def test_wide_codes_by_hand():
    """Two bytes a code, the low one first."""
    assert pack(torch.tensor([[0x01FF, 0x0200, 3]]), 10).tolist() == [[0xFF, 0x01, 0x00, 0x02, 3, 0]]
    assert pack(torch.tensor([[65535, 256]]), 16).tolist() == [[255, 255, 0, 1]]


def test_last_octet_is_filled_up_with_zeros():
    assert pack(torch.tensor([[15, 15, 15]]), 4).tolist() == [[0xFF, 0x0F, 0, 0]]


def test_eight_bits_are_not_filled_up():
    assert pack(torch.tensor([[7, 255, 0]]), 8).tolist() == [[7, 255, 0]]


def test_four_bits_take_two_codes_a_byte():
    assert pack(some_codes((6, 64), 4), 4).shape == (6, 32)


def test_bytes_of_all_widths(subtests):
    for shape in SHAPES:
        for n_bits in BITS:
            with subtests.test(shape=shape, n_bits=n_bits):
                codes = some_codes(shape, n_bits)
                packed = pack(codes, n_bits)
                assert packed.dtype == torch.uint8
                assert packed.tolist() == [bytes_of(row, n_bits) for row in codes.reshape(shape[0], -1).tolist()]


def test_round_trip(subtests):
    for shape in SHAPES:
        for n_bits in BITS:
            with subtests.test(shape=shape, n_bits=n_bits):
                codes = some_codes(shape, n_bits)
                unpacked = unpack(pack(codes, n_bits), shape, n_bits)
                assert unpacked.dtype == (torch.uint8 if n_bits <= 8 else torch.int32)
                assert unpacked.shape == shape
                assert torch.equal(unpacked.long(), codes)


def test_packed_bytes_are_those_of_a_row(subtests):
    for shape in SHAPES:
        for n_bits in BITS:
            with subtests.test(shape=shape, n_bits=n_bits):
                assert packed_bytes(shape, n_bits) == pack(some_codes(shape, n_bits), n_bits).shape[1]


def test_codes_of_any_dtype(subtests):
    for dtype in [torch.float32, torch.int64, torch.int32, torch.int16]:
        for n_bits in [3, 4, 8, 12]:
            with subtests.test(dtype=dtype, n_bits=n_bits):
                codes = some_codes((3, 11), n_bits)
                assert torch.equal(pack(codes.to(dtype), n_bits), pack(codes, n_bits))


def test_slices_of_a_larger_weight(subtests):
    for n_bits in [3, 4, 8, 12]:
        with subtests.test(n_bits=n_bits):
            whole = some_codes((4, 10, 3, 3), n_bits)
            part = whole[:, 3:8]
            assert torch.equal(unpack(pack(part, n_bits), part.shape, n_bits).long(), part)


def test_rows_are_packed_by_themselves(subtests):
    for n_bits in BITS:
        with subtests.test(n_bits=n_bits):
            codes = some_codes((4, 13), n_bits)
            packed = pack(codes, n_bits)
            for i in range(4):
                assert torch.equal(pack(codes[i : i + 1], n_bits)[0], packed[i])
