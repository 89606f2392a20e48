"""Micro-batches: masks and positions equal megatron-core's."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from megatron_cpt.data.loading.batch import DocumentOptions, make_batch
from megatron_cpt.errors import UserError

EOD = 9


def test_plain():
    batch = make_batch([np.array([1, EOD, 3, 4], np.uint16), np.array([5, 6, 7, 8], np.uint16)], [2, 0])
    assert batch.tokens.tolist() == [[1, EOD, 3], [5, 6, 7]]
    assert batch.labels.tolist() == [[EOD, 3, 4], [6, 7, 8]]
    assert batch.loss_mask.tolist() == [[1, 1, 1]] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2]] * 2
    assert batch.sources.tolist() == [2, 0]
    assert batch.attention_documents is None
    assert (batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype) == (np.int64, np.int64, np.int64)
    assert batch.loss_mask.dtype == np.float32
    assert all(array.flags.c_contiguous for array in (batch.tokens, batch.labels, batch.position_ids))


def test_documents_by_hand():
    sample = np.array([1, EOD, 3, 4, EOD, EOD, 5])  # the fifth input ends a document, so does the sixth
    options = DocumentOptions(EOD, reset_attention=True, reset_positions=True, eod_loss=False)
    batch = make_batch([sample], [0], options)
    assert batch.attention_documents is not None
    assert batch.attention_documents.dtype == np.int32
    assert batch.attention_documents.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(("reset_attention", "reset_positions", "eod_loss"), list(product([False, True], repeat=3)))
def test_equals_megatron_core(reset_attention, reset_positions, eod_loss):
    theirs = pytest.importorskip("megatron.core.datasets.gpt_dataset")._get_ltor_masks_and_position_ids
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 12, 41) for _ in range(20)]  # an end of document every 12 tokens, some side by side
    samples.append(np.full(41, EOD))
    batch = make_batch(samples, range(21), DocumentOptions(EOD, reset_attention, reset_positions, eod_loss))
    for row, sample in enumerate(samples):
        hidden, loss_mask, position_ids = theirs(
            torch.from_numpy(sample[:-1].copy()), EOD, reset_positions, reset_attention, not eod_loss, True
        )
        assert batch.loss_mask[row].tolist() == loss_mask.tolist()
        assert batch.position_ids[row].tolist() == position_ids.tolist()
        visible = np.tril(np.ones((40, 40), bool))
        if batch.attention_documents is not None:
            documents = batch.attention_documents[row]
            visible &= documents[:, None] == documents
        assert (visible == ~hidden[0].numpy()).all()


@pytest.mark.parametrize("option", [{"reset_attention": True}, {"reset_positions": True}, {"eod_loss": False}])
def test_options_need_an_end_of_document(option):
    with pytest.raises(UserError, match=r"need an end-of-document id or the boundaries in the \.idx"):
        make_batch(np.zeros((1, 5), np.int64), [0], DocumentOptions(**option))


def test_boundaries_of_the_index():
    """The sample 5 6 | 7 9 8, with an end of document 9 inside the second document."""
    options = DocumentOptions(9, reset_attention=True, reset_positions=True, eod_loss=False)
    samples, ends = np.array([[5, 6, 7, 9, 8, 4]]), np.array([[False, True, False, False, False]])
    batch = make_batch(samples, [0], options, ends)
    assert batch.loss_mask.tolist() == [[1, 0, 1, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 0]]
    assert batch.attention_documents is not None
    assert batch.attention_documents.tolist() == [[0, 0, 1, 1, 2]]
    alone = make_batch(samples, [0], DocumentOptions(reset_positions=True), ends)
    assert alone.position_ids.tolist() == [[0, 1, 0, 1, 2]]
