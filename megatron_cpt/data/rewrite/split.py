"""Divides documents by a hash of their content: a held-out set that never changes, or a sample.

A document's side depends on its tokens and the seed alone: not on its place, on the file it is in, or on what else
there is. Copies of a document therefore fall on the same side (a held-out document has no exact twin in training),
and a corpus that grows keeps its held-out documents.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.rewrite.merge import require_free
from megatron_cpt.data.tokenfile.documents import DocumentBlock, document_blocks
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter
from megatron_cpt.errors import UserError


@dataclass(frozen=True)
class SplitReport:
    """What went where.

    Attributes:
        held_out_documents: documents in the held-out set or the sample.
        held_out_tokens: their tokens.
        rest_documents: all other documents, written or not.
        rest_tokens: their tokens.
    """

    held_out_documents: int
    held_out_tokens: int
    rest_documents: int
    rest_tokens: int


def split_datasets(
    prefixes: Sequence[str],
    held_out_prefix: str,
    rest_prefix: str | None,
    *,
    fraction: float,
    seed: int = 1234,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SplitReport:
    """Write a fraction of the documents to one data set, and the others to another.

    Order is kept; a document of several sequences becomes one of a single sequence. One block of a few megabytes (or
    the longest document) is in memory at a time, and 4 bytes a document.

    Args:
        prefixes: where the documents are; tokens of one type.
        held_out_prefix: where the fraction goes.
        rest_prefix: where the others go; None: nowhere, which makes a sample.
        fraction: of the documents, above 0 and below 1. Each one is drawn by its hash, so the share comes out as of a
            lottery: within about sqrt(fraction * documents) documents of it.
        seed: another seed draws others.
        overwrite: whether existing pairs may be replaced.
        progress: called with the bytes of each block that is done.

    Raises:
        UserError: a file is missing, the types differ, an output is there or is an input, or the seed is too large.
        RefusedError: an input is damaged.
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction: {fraction}: give a share of the documents above 0 and below 1")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed: {seed}: give one of 64 bits")
    outputs = [held_out_prefix, *([] if rest_prefix is None else [rest_prefix])]
    if len(set(outputs)) != len(outputs):
        raise UserError(f"{held_out_prefix}: is both outputs; choose two")
    datasets = _open_alike(prefixes)
    for output in outputs:
        require_free(output, prefixes, overwrite=overwrite)
    report = SplitReport(0, 0, 0, 0)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(output, datasets[0].dtype)) for output in outputs]
        for dataset in datasets:
            for block in document_blocks(dataset):
                is_held_out = content_hashes(block, seed) < int(fraction * 2**64)
                report = _write(block, is_held_out, writers, report)
                if progress is not None:
                    progress(block.tokens.nbytes)
    return report


def content_hashes(block: DocumentBlock, seed: int) -> npt.NDArray[np.uint64]:
    """64 bits for each document out of its ids and the seed, whatever type the ids are stored in.

    Returns:
        uint64 (num_documents,).
    """
    ids = np.ascontiguousarray(block.tokens, "<i4").data.cast("B")  # no vocabulary has 2^31 ids
    key = seed.to_bytes(8, "little", signed=True)
    bounds = (block.bounds * 4).tolist()
    digests = [hashlib.blake2b(ids[start:end], digest_size=8, key=key).digest() for start, end in pairwise(bounds)]
    return np.frombuffer(b"".join(digests), "<u8")


def select(block: DocumentBlock, keep: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
    """The tokens of some documents of a block, one after another, and the length of each."""
    lengths = block.lengths
    return block.tokens[np.repeat(keep, lengths)], lengths[keep]


def _open_alike(prefixes: Sequence[str]) -> list[IndexedDataset]:
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError("no data set is given; name at least one prefix of .bin/.idx")
    other = next((dataset for dataset in datasets if dataset.dtype != datasets[0].dtype), None)
    if other is not None:
        types = f"{other.dtype.name} tokens, {datasets[0].prefix} has {datasets[0].dtype.name}"
        raise UserError(f"{other.prefix}: has {types}; divide them one by one")
    return datasets


def _write(
    block: DocumentBlock,
    is_held_out: npt.NDArray[np.bool_],
    writers: Sequence[IndexedDatasetWriter],
    so_far: SplitReport,
) -> SplitReport:
    sides = [select(block, is_held_out), select(block, ~is_held_out)]
    for writer, (tokens, lengths) in zip(writers, sides, strict=False):  # a sample has no writer for the rest
        writer.add_documents(tokens, lengths)
    (held_out, held_out_lengths), (rest, rest_lengths) = sides
    return SplitReport(
        so_far.held_out_documents + len(held_out_lengths),
        so_far.held_out_tokens + held_out.size,
        so_far.rest_documents + len(rest_lengths),
        so_far.rest_tokens + rest.size,
    )
