"""Arrays from one process to another through shared memory."""

from __future__ import annotations

import multiprocessing

import numpy as np

from megatron_cpt.data.preprocess.workers import SharedSlots, SlotAllocator


def fill(slots: SharedSlots, number: int) -> None:
    slots.slot(number)[:] = number


def test_another_process_writes_into_the_same_memory():
    slots = SharedSlots(3, 4096)
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(slots, 2))
    process.start()
    process.join()
    assert process.exitcode == 0
    slots.close()
    assert [np.unique(slots.slot(number)).tolist() for number in range(3)] == [[0], [0], [2]]


def test_arrays_lie_side_by_side_while_they_fit():
    slot = np.zeros(64, np.uint8)
    allocator = SlotAllocator(slot)
    odd, wide = allocator.empty(3, np.dtype("<u2")), allocator.empty(8, np.dtype("<i4"))
    large, last = allocator.empty(9, np.dtype("<i4")), allocator.empty(6, np.dtype("<i4"))
    odd[:], wide[:], large[:], last[:] = 1, 2, 3, 4
    places = [allocator.offset_of(array) for array in (odd, wide, large, last)]
    assert places == [0, 8, None, 40]
    assert slot[:6].view("<u2").tolist() == [1] * 3
    assert slot[8:40].view("<i4").tolist() == [2] * 8
    assert large.tolist() == [3] * 9
    assert allocator.offset_of(allocator.empty(0, np.dtype("<i4"))) is None
