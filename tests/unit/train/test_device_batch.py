"""Packing of a step into one buffer, reuse of pinned buffers, and the upload against the arrays themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from megatron_cpt.backend import cpu
from megatron_cpt.data.loading.batch import DocumentOptions, make_batch
from megatron_cpt.train.device_batch import (
    DeviceBatch,
    PinnedBuffers,
    Uploader,
    make_upload,
    pack,
    packed_offsets,
    unpack,
)

cpu.install()

EOD = 9
ARRAYS = npst.arrays(
    dtype=st.sampled_from([np.int64, np.int32, np.float32, np.uint8, np.bool_]),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7),
)


@given(st.lists(ARRAYS, max_size=12))
def test_any_arrays_come_back_from_one_buffer(arrays):
    offsets, size = packed_offsets(arrays)
    memory = torch.empty(size, dtype=torch.uint8)
    pack(arrays, offsets, memory)
    tensors = unpack(arrays, offsets, memory)
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


class Copy:
    """Event of a copy; notes that somebody has waited for it."""

    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


def test_a_pinned_buffer_is_refilled_only_after_its_copy():
    sizes = []
    buffers = PinnedBuffers(2, lambda size: sizes.append(size) or torch.empty(size, dtype=torch.uint8))
    copies = [Copy() for _ in range(5)]
    taken = [buffers.take(size, copy) for size, copy in zip([64, 128, 32, 128, 256], copies, strict=True)]
    assert [len(buffer) for buffer in taken] == [64, 128, 32, 128, 256]
    assert sizes == [64, 128, 256]  # a smaller step fits into the buffer that is there
    assert taken[2].data_ptr() == taken[0].data_ptr()
    assert taken[3].data_ptr() == taken[1].data_ptr()
    assert [copy.waits for copy in copies] == [1, 1, 1, 0, 0]


def _batches(**options):
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 12, (3, 2, 17))
    return [make_batch(micro, rng.integers(0, 4, 2), DocumentOptions(EOD, **options)) for micro in samples]


@pytest.mark.parametrize("packs_documents", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_an_uploaded_step_equals_its_arrays(monkeypatch, packs_documents, reset):
    seen = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda memory, stream: seen.append(memory))
    buffers = PinnedBuffers(allocate=lambda size: torch.empty(size, dtype=torch.uint8))
    uploader = Uploader(cpu.CPU, packs_documents=packs_documents, buffers=buffers)
    on_host = make_upload(cpu.CPU, packs_documents=packs_documents)
    steps = [_batches(reset_attention=reset, eod_loss=not reset) for _ in range(3)]
    uploads = [uploader(batches) for batches in steps]  # the buffers are used again, the memory of a step is not
    for batches, uploaded in zip(steps, uploads, strict=True):
        there = uploaded.wait()
        assert seen[-1] is uploaded.memory
        assert len({tensor.untyped_storage().data_ptr() for batch in there for tensor in _tensors(batch)}) == 1
        for copied, original in zip(there, on_host(batches).wait(), strict=True):
            assert copied.longest_sequence == original.longest_sequence
            for a, b in zip(_tensors(copied), _tensors(original), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert (copied.sequence_bounds is not None) == (reset and packs_documents)
            assert (copied.attention_documents is not None) == (reset and not packs_documents)


def _tensors(batch: DeviceBatch) -> list[torch.Tensor]:
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_a_cpu_shares_the_memory_of_the_arrays():
    batches = _batches()
    there = make_upload(cpu.CPU, packs_documents=False)(batches).wait()
    assert [batch.tokens.data_ptr() for batch in there] == [batch.tokens.ctypes.data for batch in batches]
