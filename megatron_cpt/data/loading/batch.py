"""From samples to the arrays a training step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import UserError


@dataclass(frozen=True)
class DocumentOptions:
    """What happens where one document ends and the next begins inside a sample.

    Attributes:
        eod_id: the id that ends a document; None if the data has none.
        reset_attention: tokens do not see the documents before their own.
        reset_positions: positions count from 0 in each document.
        eod_loss: whether predicting the first token after an end of document counts in the loss.
    """

    eod_id: int | None = None
    reset_attention: bool = False
    reset_positions: bool = False
    eod_loss: bool = True

    def __post_init__(self) -> None:
        wanted = [
            setting
            for setting, on in (
                ("reset_attention: true", self.reset_attention),
                ("reset_positions: true", self.reset_positions),
                ("eod_loss: false", not self.eod_loss),
            )
            if on
        ]
        if wanted and self.eod_id is None:
            raise UserError(
                f"documents: {', '.join(wanted)} needs to know the id that ends a document, and there is none; "
                "name a tokenizer that has one, or leave the option out"
            )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank; S is the sequence length.

    Attributes:
        tokens: int64 (micro, S), the input.
        labels: int64 (micro, S), the token that follows each input token.
        loss_mask: float32 (micro, S), 1 where the prediction counts.
        position_ids: int64 (micro, S).
        sources: int64 (micro,), the source of each sample, a place in the run's list of sources.
        attention_documents: int32 (micro, S) if attention is reset: number of the document inside the sample; a token
            sees those of its own number only. Else None.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    attention_documents: npt.NDArray[np.int32] | None = None


def make_batch(
    samples: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
    sources: npt.ArrayLike,
    options: DocumentOptions = DocumentOptions(),
) -> Batch:
    """Builds a micro-batch.

    An end-of-document token belongs to the document it ends. Masks and positions follow megatron-core
    (`datasets/gpt_dataset.py`, `_get_ltor_masks_and_position_ids`): with `eod_loss` off the place whose *input* is the
    end of a document does not count, for what it predicts is the start of an unrelated text.

    Args:
        samples: (micro, S + 1) ids of any integer type, as one array or a row each.
        sources: the source of each.
        options: what happens at the ends of documents.
    """
    samples = np.asarray(samples)
    # copies that are contiguous (each array is handed to the device by itself), widened only now: samples are read, put
    # together and checked in the narrower type of their files
    tokens, labels = samples[:, :-1].astype(np.int64, order="C"), samples[:, 1:].astype(np.int64, order="C")
    loss_mask = np.ones(tokens.shape, np.float32)
    position_ids = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1))
    attention_documents = None
    if options.eod_id is not None:
        ends = tokens == options.eod_id
        if not options.eod_loss:
            loss_mask[ends] = 0.0
        if options.reset_positions:
            position_ids -= _document_starts(ends)
        if options.reset_attention:
            attention_documents = (np.cumsum(ends, axis=1) - ends).astype(np.int32)
    return Batch(tokens, labels, loss_mask, position_ids, np.asarray(sources, np.int64), attention_documents)


def _document_starts(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each place the place at which its document begins; a document begins after the end of the one before."""
    starts = np.zeros(ends.shape, np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
