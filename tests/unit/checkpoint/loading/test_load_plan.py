"""Plan of a load: which stored boxes fill a tensor of the run, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cpt.backend import cpu

cpu.install()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_cpt.checkpoint.loading.load import _plan  # noqa: E402
from megatron_cpt.checkpoint.loading.stored_state import StoredBox, StoredState  # noqa: E402
from megatron_cpt.errors import RefusedError  # noqa: E402

CHECKPOINT = Path("step-00000004")


def _stored(shape: tuple[int, ...], *row_ranges: tuple[int, int]) -> StoredState:
    """Return a checkpoint with one tensor `w`, stored as boxes of whole rows."""
    boxes = [
        StoredBox((start, 0), (stop - start, *shape[1:]), CHECKPOINT / "__0_0.distcp", 0, 0)
        for start, stop in row_ranges
    ]
    return StoredState({"w": shape}, {"w": boxes}, common={})


def _wanted(rank: int, num_ranks: int, *, is_padded: bool = False) -> ShardedTensor:
    """Return the 4 rows of `w` that one of several ranks owns."""
    rows = torch.full((4, 3), -1.0)
    return ShardedTensor.from_rank_offsets("w", rows, (0, rank, num_ranks), allow_shape_mismatch=is_padded)


def test_rows_are_taken_from_every_box_that_holds_some() -> None:
    reads = _plan(_wanted(1, 2), _stored((8, 3), (0, 3), (3, 5), (5, 8)), None, CHECKPOINT)
    assert [(read.source.offsets, read.offsets, tuple(read.target.shape)) for read in reads] == [
        ((3, 0), (1, 0), (1, 3)),
        ((5, 0), (0, 0), (3, 3)),
    ]


def test_elements_that_no_shard_holds_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"w: only 9 of 12 elements at \(4, 0\) are in the checkpoint"):
        _plan(_wanted(1, 2), _stored((8, 3), (0, 5), (6, 8)), None, CHECKPOINT)


def test_a_tensor_of_another_name_or_shape_is_refused() -> None:
    with pytest.raises(RefusedError, match="does not fit this model: it has no tensor other"):
        _plan(_wanted(0, 2), _stored((8, 3), (0, 8)), "other", CHECKPOINT)
    with pytest.raises(RefusedError, match=r"w has shape \(9, 3\), should be \(8, 3\)"):
        _plan(_wanted(0, 2), _stored((9, 3), (0, 9)), None, CHECKPOINT)


def test_rows_beyond_a_smaller_padded_vocabulary_are_zero() -> None:
    wanted = _wanted(1, 2, is_padded=True)
    (read,) = _plan(wanted, _stored((6, 3), (0, 6)), None, CHECKPOINT)
    assert tuple(read.target.shape) == (2, 3)
    assert wanted.data.count_nonzero() == 0
