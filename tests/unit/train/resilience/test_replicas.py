"""Hashes of parameters and the comparison of replicas."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.train.resilience import replicas
from megatron_cpt.train.resilience.replicas import bit_hash

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


@given(st.sampled_from(TYPES), st.integers(1, 300), st.data())
def test_one_flipped_bit_anywhere_changes_it(dtype, size, data):
    tensor = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8)
    before = bit_hash(tensor.view(dtype))
    bit = data.draw(st.integers(0, 8 * len(tensor) - 1))
    tensor[bit // 8] ^= 1 << bit % 8
    assert bit_hash(tensor.view(dtype)) != before


def test_places_count():
    tensor = torch.tensor([1.0, 2.0, 3.0])
    assert bit_hash(tensor) != bit_hash(tensor.flip(0))
    assert bit_hash(torch.zeros(2)) != bit_hash(torch.zeros(3))  # different numbers of words


def test_not_a_number_and_negative_zero_are_bits_like_any_other():
    assert bit_hash(torch.tensor([float("nan")])) == bit_hash(torch.tensor([float("nan")]))
    assert bit_hash(torch.tensor([0.0])) != bit_hash(torch.tensor([-0.0]))


def test_blocks_make_no_difference(monkeypatch):
    tensor = torch.randn(1001, dtype=torch.bfloat16)
    whole = bit_hash(tensor)
    monkeypatch.setitem(replicas._BLOCK, "cpu", 17)
    assert bit_hash(tensor) == whole


def test_a_view_that_begins_anywhere_is_hashed_as_its_copy():
    storage = torch.randn(100, dtype=torch.bfloat16)
    for begin in range(5):
        assert bit_hash(storage[begin:90]) == bit_hash(storage[begin:90].clone())


def test_it_is_the_same_for_ever():
    # in plain Python with 64 bits: two words of two floats each, and one float padded with zeros
    mask, total = (1 << 64) - 1, 0
    values = torch.tensor([1.0, -2.0, 0.0, 3.5, -1.0])
    words = struct.unpack("<3Q", values.numpy().tobytes() + bytes(4))

    def shift(value: int, by: int) -> int:  # an arithmetic shift, as in torch
        signed = value - (1 << 64) if value >> 63 else value
        return (signed >> by) & mask

    for place, bits in enumerate(words):
        mixed = (place * 0x9E3779B97F4A7C15 & mask) ^ bits
        mixed = (mixed ^ shift(mixed, 31)) * 0xBF58476D1CE4E5B9 & mask
        total = (total + (mixed ^ shift(mixed, 29))) & mask
    assert bit_hash(values).item() & mask == total


def test_the_rank_in_the_minority_is_named():
    hashes = torch.tensor([[1, 5], [1, 5], [1, 6]])
    assert replicas._differences(["module.a", "module.b"], hashes, [0, 2, 4]) == ["b on rank 4"]
    two = torch.tensor([[1, 5], [2, 5]])
    assert replicas._differences(["module.a", "module.b"], two, [1, 3]) == ["a among ranks [1, 3]"]


@pytest.mark.parametrize("size", [0, 1])
def test_small_tensors(size):
    assert bit_hash(torch.ones(size)).dtype == torch.int64
