"""Micro-batches: the arrays of a forward pass, made from samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import UserError


@dataclass(frozen=True)
class DocumentOptions:
    """Treatment of the boundaries between documents inside a sample.

    A document ends at an end-of-document id, and at each boundary in the `.idx` of its file.

    Attributes:
        eod_id: end-of-document id; None if the data has none.
        reset_attention: tokens attend only to tokens of their own document.
        reset_positions: position ids restart at 0 in each document.
        eod_loss: the prediction of the first token after an end of document counts in the loss.
    """

    eod_id: int | None = None
    reset_attention: bool = False
    reset_positions: bool = False
    eod_loss: bool = True

    @property
    def need_ends(self) -> bool:
        """True if an option depends on the ends of documents."""
        return self.reset_attention or self.reset_positions or not self.eod_loss

    @property
    def attention_key(self) -> dict[str, Any]:
        """The options that change what a model sees at a position; `eod_loss` decides only which positions count."""
        resets = {"reset_attention": self.reset_attention, "reset_positions": self.reset_positions}
        return {**resets, "eod_id": self.eod_id if any(resets.values()) else None}


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's k most likely next tokens at each position of some samples.

    A source without a teacher has zeros, and the ids 0 to k - 1.

    Attributes:
        ids: uint16 or uint32 (samples, S, k); all k are different.
        log_probs: float16 (samples, S, k).
        log_tail: float16 (samples, S), log of the probability that all other tokens have together.
    """

    ids: npt.NDArray[Any]
    log_probs: npt.NDArray[np.float16]
    log_tail: npt.NDArray[np.float16]

    def rows(self, part: slice) -> TeacherTargets:
        """Return the targets of some samples."""
        return TeacherTargets(self.ids[part], self.log_probs[part], self.log_tail[part])


@dataclass(frozen=True)
class Batch:
    """Micro-batch of one data-parallel rank; S is the sequence length.

    Attributes:
        tokens: int64 (micro, S), the inputs.
        labels: int64 (micro, S), the token that follows each input token.
        loss_mask: float32 (micro, S), 1 where the prediction counts, else 0.
        position_ids: int64 (micro, S).
        sources: int64 (micro,), index of each sample's source in the run's list of sources.
        attention_documents: int32 (micro, S), number of each token's document inside the sample; a token attends only
            to tokens with its own number. None unless attention is reset.
        teacher: targets of a cached teacher; None without one.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    attention_documents: npt.NDArray[np.int32] | None = None
    teacher: TeacherTargets | None = None


def make_batch(
    samples: Sequence[npt.NDArray[Any]] | npt.NDArray[Any],
    sources: npt.ArrayLike,
    options: DocumentOptions = DocumentOptions(),
    ends: npt.NDArray[np.bool_] | None = None,
    teacher: TeacherTargets | None = None,
) -> Batch:
    """Build a micro-batch.

    The last token of a document, such as its end-of-document token, belongs to the document it ends. Masks and
    positions follow megatron-core (`datasets/gpt_dataset.py`, `_get_ltor_masks_and_position_ids`): with `eod_loss` off,
    a position whose *input* is an end of document does not count, because it predicts the start of an unrelated text.

    Example: with eod_id 9, `eod_loss` off and both resets on, the sample [5, 6, 9, 7, 8] gives
        tokens               5 6 9 7
        labels               6 9 7 8
        loss_mask            1 1 0 1
        position_ids         0 1 2 0
        attention_documents  0 0 0 1

    Args:
        samples: (micro, S + 1) ids of any integer type, as one array or a sequence of rows.
        sources: (micro,), source index per sample.
        options: treatment of document boundaries.
        ends: (micro, S), True at the last token of each document by the `.idx`, besides the end-of-document ids.
        teacher: targets of a cached teacher for the samples.

    Raises:
        UserError: an option depends on the ends of documents, and neither these nor an end-of-document id is given.
    """
    samples = np.asarray(samples)
    # Widened only here, because samples are read and checked faster in their files' narrower type. Contiguous, because
    # each array is copied to the device separately.
    tokens, labels = samples[:, :-1].astype(np.int64, order="C"), samples[:, 1:].astype(np.int64, order="C")
    loss_mask = np.ones(tokens.shape, np.float32)
    position_ids = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1))
    attention_documents = None
    if options.need_ends:
        if options.eod_id is None and ends is None:
            raise UserError("documents: the options need an end-of-document id or the boundaries in the .idx; give one")
        at_id = tokens == options.eod_id if options.eod_id is not None else np.zeros(tokens.shape, np.bool_)
        ends = at_id if ends is None else at_id | ends
        if not options.eod_loss:
            loss_mask[ends] = 0.0
        if options.reset_positions:
            position_ids -= _document_starts(ends)
        if options.reset_attention:
            attention_documents = (np.cumsum(ends, axis=1) - ends).astype(np.int32)
    return Batch(tokens, labels, loss_mask, position_ids, np.asarray(sources, np.int64), attention_documents, teacher)


def _document_starts(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return, for each position, the position at which its document starts."""
    starts = np.zeros(ends.shape, np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
