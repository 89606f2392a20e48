"""Check that no run trains on documents that it validates on, or on the same data under two names.

Datasets are compared by a fingerprint of their content, and document lists by their entries. Copies of single documents
in another dataset are not found: `megatron-cpt overlap` finds them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.rewrite.split import content_hashes
from megatron_cpt.data.tokenfile.document_list import is_document_list, read_document_list
from megatron_cpt.data.tokenfile.documents import document_blocks
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.listed_documents import open_dataset
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes
from megatron_cpt.errors import UserError
from megatron_cpt.files.remote import is_remote
from megatron_cpt.recipe.hold_out import SPLIT_SEED, RecipeSource

_Documents = npt.NDArray[np.int64] | None  # None: all documents of the dataset


def refuse_repeated_data(sources: Sequence[RecipeSource], split: float | None) -> None:
    """Refuse held-out data that is also trained on, and training data that is given twice.

    Args:
        split: share of the documents that will be held out of sources without held-out data.

    Raises:
        UserError: a document is in both, or two prefixes have the same documents.
    """
    datasets = _Datasets()
    read = [(source, prefix, datasets.parts(prefix)) for source in sources for prefix in source.prefixes]
    trained = [(source, prefix, *part) for source, prefix, parts in read for part in parts]
    readers: dict[str, list[tuple[str, _Documents]]] = {}
    for source, _, name, documents in trained:
        readers.setdefault(name, []).append((source.name, documents))
    for source in sources:
        for prefix in expand_prefixes(list(source.held_out)) if source.held_out else ():
            for name, documents in datasets.parts(prefix):
                for reader, also in readers.get(name, ()):
                    if _share_documents(documents, also):
                        raise UserError(
                            f"--held-out {source.name}={prefix}: is also trained on, as source {reader}; give "
                            "other data, or let --split hold documents out"
                        )
    _refuse_repeated(read)
    if split is None:
        return
    divided = {name: source.name for source, _, name, _ in trained if not source.held_out}
    for source, prefix, name, documents in trained:
        if source.held_out and name in divided and (documents is None or _has_held_out(prefix, name, datasets, split)):
            raise UserError(
                f"source {source.name}: {prefix}: has documents that --split holds out of source {divided[name]}, so "
                "the run would train on them; split first, and take documents from the training part alone"
            )


class _Datasets:
    """Names for datasets, such that copies and links of a dataset have the same name.

    Only datasets of equal size are read, at about 64 places each.
    """

    def __init__(self) -> None:
        self._of_file: dict[tuple[int, int], str] = {}  # by device and inode of the `.bin`
        self._of_size: dict[tuple[int, int], list[IndexedDataset]] = {}
        self._fingerprints: dict[str, str] = {}

    def parts(self, prefix: str) -> list[tuple[str, _Documents]]:
        """Return the name of each dataset behind a prefix or a document list, with the documents of it."""
        if not is_document_list(prefix):
            return [(self.name(IndexedDataset(prefix)), None)]
        listed = read_document_list(prefix)
        chosen = [(part, listed.chosen_of(index)) for index, part in enumerate(open_dataset(prefix).parts)]
        return [(self.name(part), None if len(each) == part.num_documents else each) for part, each in chosen]

    def name(self, dataset: IndexedDataset) -> str:
        """Return the prefix of the first dataset with this content."""
        if not dataset.num_tokens:
            return os.path.abspath(dataset.prefix)  # empty shards repeat nothing
        if is_remote(dataset.prefix):
            return self._name_by_content(dataset)
        status = os.stat(f"{dataset.prefix}.bin")
        file = (status.st_dev, status.st_ino)
        if file not in self._of_file:
            self._of_file[file] = self._name_by_content(dataset)
        return self._of_file[file]

    def _name_by_content(self, dataset: IndexedDataset) -> str:
        alike = self._of_size.setdefault((dataset.num_documents, dataset.num_tokens), [])
        for other in alike:
            if other.prefix == dataset.prefix or is_same_data(self._fingerprint(other), self._fingerprint(dataset)):
                return other.prefix
        alike.append(dataset)
        return dataset.prefix

    def _fingerprint(self, dataset: IndexedDataset) -> str:
        if dataset.prefix not in self._fingerprints:
            self._fingerprints[dataset.prefix] = fingerprint([dataset])
        return self._fingerprints[dataset.prefix]


def _refuse_repeated(trained: Sequence[tuple[RecipeSource, str, list[tuple[str, _Documents]]]]) -> None:
    """Refuse two prefixes with the same documents: each would be read up to four times."""
    seen: dict[frozenset[tuple[str, bytes | None]], tuple[str, str]] = {}
    for source, prefix, parts in trained:
        content = frozenset(
            (name, None if documents is None else documents.tobytes())
            for name, documents in parts
            if documents is None or documents.size
        )
        name, other = seen.setdefault(content, (source.name, prefix))
        if (name, other) != (source.name, prefix):
            raise UserError(
                f"source {source.name}: {prefix}: has the same documents as {other} of source {name}, so they would be "
                "read up to eight times instead of four; give them to one source, once"
            )


def _share_documents(one: _Documents, other: _Documents) -> bool:
    if one is None or other is None:
        return (one is None or one.size > 0) and (other is None or other.size > 0)
    return np.intersect1d(one, other, assume_unique=True).size > 0


def _has_held_out(path: str, name: str, datasets: _Datasets, split: float) -> bool:
    """Return whether a list names documents of a dataset that a split by content hashes holds out."""
    dataset = open_dataset(path)
    parts = [index for index, part in enumerate(dataset.parts) if datasets.name(part) == name]
    hashes = [np.empty(0, np.uint64), *(content_hashes(block, SPLIT_SEED) for block in document_blocks(dataset))]
    of_dataset = np.isin(read_document_list(path).dataset, parts)
    return bool((of_dataset & (np.concatenate(hashes) < int(split * 2**64))).any())
