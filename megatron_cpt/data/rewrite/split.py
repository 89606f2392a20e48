"""Split of datasets by a hash of each document: a held-out set that stays fixed, or a random sample.

The side of a document depends only on its tokens and the seed, not on its position, its file or other documents. So
copies of a document are on the same side (no held-out document has an exact copy in training), and held-out documents
stay held out when the corpus grows.

Example: a document whose 64-bit hash is 0.004 * 2^64 is held out with fraction 0.01 and with 0.1, but not with 0.001.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.documents import DocumentBlock, document_blocks
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import join_tokenizers, open_with_one_dtype
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter, require_free
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import publish_or_remove


@dataclass(frozen=True)
class SplitReport:
    """Size of both sides of a split, the held-out set (or sample) and the rest, written or not."""

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
    allow_mixed_tokenizers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SplitReport:
    """Write a fraction of the documents to one dataset, and the rest to another.

    Documents stay in order. A document of several sequences is written as one sequence. Memory: one block of a few
    megabytes (or the longest document), plus 4 bytes per document.

    Args:
        held_out_prefix: output for the fraction.
        rest_prefix: output for the rest; None: the rest is not written, which makes the fraction a sample.
        fraction: share of the documents, above 0 and below 1. Documents are drawn independently, so the number of
            documents deviates by about sqrt(fraction * documents).
        seed: a different seed draws different documents.
        allow_mixed_tokenizers: accept datasets although their sidecars name different tokenizers.
        progress: called with the number of bytes after each block.

    Raises:
        UserError: a file is missing, token types differ, an output exists or is an input, or the seed is too large.
        RefusedError: an input is damaged, or the tokenizers differ.
        ChangedFileError: an input changed while it was read.
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction: {fraction}: give a share of the documents above 0 and below 1")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed: {seed}: give a signed integer of 64 bits")
    outputs = [held_out_prefix, *([] if rest_prefix is None else [rest_prefix])]
    if len({os.path.realpath(output) for output in outputs}) != len(outputs):
        raise UserError(f"{held_out_prefix}: is given for both outputs; choose two different prefixes")
    datasets = open_with_one_dtype(prefixes)
    for output in outputs:
        require_free(output, prefixes, overwrite=overwrite)
    options = {"fraction": fraction, "seed": seed, "data": fingerprint(datasets)}
    origin = join_tokenizers(datasets, "split", options, allow_mixed=allow_mixed_tokenizers)
    totals = np.zeros((2, 2), np.int64)  # documents and tokens of each side
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(output, datasets[0].dtype, origin=origin)) for output in outputs
        ]
        for dataset in datasets:
            for block in document_blocks(dataset):
                is_held_out = content_hashes(block, seed) < int(fraction * 2**64)
                sides = [select(block, is_held_out), select(block, ~is_held_out)]
                for writer, side in zip(writers, sides, strict=False):  # without rest_prefix there is one writer
                    writer.add_documents(*side)
                totals += [(len(lengths), tokens.size) for tokens, lengths in sides]
                if progress is not None:
                    progress(block.tokens.nbytes)
        for dataset in datasets:  # everything is read, and nothing is published
            dataset.check_unchanged()
        # together: after a failure neither exists, and the next call is not refused because of the other one
        publish_or_remove([rename for writer in writers for rename in writer.finish()])
    return SplitReport(*totals.ravel().tolist())


def content_hashes(block: DocumentBlock, seed: int) -> npt.NDArray[np.uint64]:
    """Hash each document's ids with the seed to 64 bits; the type that the ids are stored in makes no difference."""
    ids = np.ascontiguousarray(block.tokens, "<i4").data.cast("B")  # no vocabulary has 2^31 ids
    key = seed.to_bytes(8, "little", signed=True)
    bounds = (block.bounds * 4).tolist()
    digests = [hashlib.blake2b(ids[start:end], digest_size=8, key=key).digest() for start, end in pairwise(bounds)]
    return np.frombuffer(b"".join(digests), "<u8")


def select(block: DocumentBlock, keep: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
    """Return the concatenated tokens of the documents to keep, and the length of each of them."""
    lengths = block.lengths
    return block.tokens[np.repeat(keep, lengths)], lengths[keep]
