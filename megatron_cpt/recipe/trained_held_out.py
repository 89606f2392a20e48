"""Check that no run trains on documents that it validates on, by the names of datasets and documents.

Datasets are compared by their files and document lists by their entries. Copies of a document in another dataset are
not found: `megatron-cpt overlap` compares content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.rewrite.split import content_hashes
from megatron_cpt.data.tokenfile.document_list import is_document_list, read_document_list
from megatron_cpt.data.tokenfile.documents import document_blocks
from megatron_cpt.data.tokenfile.listed_documents import open_dataset
from megatron_cpt.data.tokenfile.reader import expand_prefixes
from megatron_cpt.errors import UserError
from megatron_cpt.files.remote import is_remote
from megatron_cpt.recipe.hold_out import SPLIT_SEED, RecipeSource

_Documents = npt.NDArray[np.int64] | None  # None: all documents of the dataset


def refuse_trained_held_out(sources: Sequence[RecipeSource], split: float | None) -> None:
    """Refuse held-out data that is also trained on.

    Args:
        split: share of the documents that will be held out of sources without held-out data.

    Raises:
        UserError: a document is in both.
    """
    trained = [(source, prefix, *part) for source in sources for prefix in source.prefixes for part in _parts(prefix)]
    readers: dict[str, list[tuple[str, _Documents]]] = {}
    for source, _, pair, documents in trained:
        readers.setdefault(pair, []).append((source.name, documents))
    for source in sources:
        for prefix in expand_prefixes(list(source.held_out)) if source.held_out else ():
            for pair, documents in _parts(prefix):
                for reader, also in readers.get(pair, ()):
                    if _share_documents(documents, also):
                        raise UserError(
                            f"--held-out {source.name}={prefix}: is also trained on, as source {reader}; give "
                            "other data, or let --split hold documents out"
                        )
    if split is None:
        return
    divided = {pair: source.name for source, _, pair, _ in trained if not source.held_out}
    for source, prefix, pair, documents in trained:
        if source.held_out and pair in divided and (documents is None or _has_held_out(prefix, pair, split)):
            raise UserError(
                f"source {source.name}: {prefix}: has documents that --split holds out of source {divided[pair]}, so "
                "the run would train on them; split first, and take documents from the training part alone"
            )


def _parts(prefix: str) -> Iterator[tuple[str, _Documents]]:
    """Yield each dataset behind a prefix or a document list, by its real path, with the documents of it."""
    if not is_document_list(prefix):
        yield _real(prefix), None
        return
    listed = read_document_list(prefix)
    for index, part in enumerate(open_dataset(prefix).parts):
        yield _real(part.prefix), listed.chosen_of(index)


def _share_documents(one: _Documents, other: _Documents) -> bool:
    if one is None or other is None:
        return (one is None or one.size > 0) and (other is None or other.size > 0)
    return np.intersect1d(one, other, assume_unique=True).size > 0


def _has_held_out(path: str, pair: str, split: float) -> bool:
    """Return whether a list names documents of a pair that a split by content hashes holds out."""
    dataset = open_dataset(path)
    parts = [index for index, part in enumerate(dataset.parts) if _real(part.prefix) == pair]
    hashes = [np.empty(0, np.uint64), *(content_hashes(block, SPLIT_SEED) for block in document_blocks(dataset))]
    of_pair = np.isin(read_document_list(path).dataset, parts)
    return bool((of_pair & (np.concatenate(hashes) < int(split * 2**64))).any())


def _real(prefix: str) -> str:
    return prefix if is_remote(prefix) else os.path.realpath(f"{prefix}.bin")
