"""Document lists NAME.docs: chosen documents of datasets, named instead of copied.

A list is a text file of JSON lines. The first line is the header, each further line one chosen document; documents are
in ascending order, and none occurs twice:

    {"format":"megatron-cpt documents","version":1,"datasets":[{"path":"web","documents":1000,"fingerprint":"f3.."}]}
    {"dataset":0,"document":17,"distance":0.31,"query":5}
    {"dataset":0,"document":402,"distance":0.28,"query":1}

`path` is a prefix of .bin/.idx, absolute or relative to the folder of the list. `distance` and `query` say why `mine`
has chosen a document; readers that only need its tokens ignore them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.header import LIST_ENDING
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import Rename, close_durably, publish
from megatron_cpt.files.remote import is_remote
from megatron_cpt.files.whole_io import is_regular_file, open_reader, open_writer

ENDING = LIST_ENDING
_FORMAT = "megatron-cpt documents"
_VERSION = 1
_LINES_PER_WRITE = 1 << 14
_MAX_LINE_BYTES = 1 << 24
_MOST, _MOST_DATASETS, _FARTHEST = int(np.iinfo(np.int64).max), int(np.iinfo(np.int32).max), float(np.finfo("f4").max)


class ListedDataset(NamedTuple):
    """Dataset that a document list chooses from.

    Attributes:
        path: prefix of the .bin/.idx pair, absolute or relative to the folder of the list.
        documents: number of documents of the dataset, chosen or not.
        fingerprint: of the dataset alone, see `fingerprint.py`.
    """

    path: str
    documents: int
    fingerprint: str


class DocumentList(NamedTuple):
    """Chosen documents, in ascending order of (dataset, document).

    Attributes:
        dataset: int32 (num_chosen,), index in `datasets`.
        document: int64 (num_chosen,), number of the document in its dataset.
        distance: float32 (num_chosen,), distance to the nearest query.
        query: int64 (num_chosen,), number of that query.
    """

    datasets: Sequence[ListedDataset]
    dataset: npt.NDArray[np.int32]
    document: npt.NDArray[np.int64]
    distance: npt.NDArray[np.float32]
    query: npt.NDArray[np.int64]

    @property
    def num_chosen(self) -> int:
        """Number of chosen documents."""
        return len(self.document)

    def chosen_of(self, index: int) -> npt.NDArray[np.int64]:
        """Return the chosen documents of one dataset, ascending."""
        first, stop = np.searchsorted(self.dataset, [index, index + 1])
        return self.document[first:stop]


def is_document_list(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a document list, by its ending; the file need not exist."""
    return os.fspath(path).endswith(ENDING)


def describe_dataset(dataset: IndexedDataset, path: str | None = None) -> ListedDataset:
    """Return the entry of a dataset in a list, under its own prefix made absolute, or under another path."""
    return ListedDataset(path or os.path.abspath(dataset.prefix), dataset.num_documents, fingerprint([dataset]))


def write_document_list(
    path: str | os.PathLike[str],
    documents: DocumentList,
    *,
    before_publish: Callable[[Sequence[Rename]], None] = lambda renames: None,
) -> None:
    """Write a list; it gets its name only when it is complete and on the disk.

    Args:
        before_publish: called with the finished file, just before it gets its final name.
    """
    assert _first_disorder(documents) is None, "documents in ascending order, each once"
    temporary = f"{os.fspath(path)}.tmp-{os.getpid()}"
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "datasets": [dataset._asdict() for dataset in documents.datasets],
        "chosen": documents.num_chosen,  # shows that a copy of the file lacks its end
    }
    columns = (documents.dataset, documents.document, documents.distance, documents.query)
    try:
        with open_writer(temporary) as file:
            file.write(orjson.dumps(header) + b"\n")
            for first in range(0, documents.num_chosen, _LINES_PER_WRITE):
                rows = zip(*(column[first : first + _LINES_PER_WRITE].tolist() for column in columns), strict=True)
                file.writelines(_line(*row) for row in rows)
            close_durably(file)
        renames = [(temporary, os.fspath(path))]
        before_publish(renames)
        publish(renames)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_document_list(path: str | os.PathLike[str]) -> DocumentList:
    """Read a list; the datasets are not opened, see `open_listed_datasets`.

    Raises:
        UserError: there is no such file.
        RefusedError: the file is no document list, of a newer version, incomplete or damaged.
    """
    if not is_regular_file(path):
        raise UserError(f"{path}: no such file; give a document list that `megatron-cpt mine` has written")
    with open_reader(path) as file:
        datasets, chosen = _read_header(path, file.readline(_MAX_LINE_BYTES))
        columns: dict[str, list[Any]] = {"dataset": [], "document": [], "distance": [], "query": []}
        blocks: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in columns}
        number = 1
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            _append_line(path, number, line, columns)
            if number % _LINES_PER_WRITE == 0:
                _move_to_blocks(columns, blocks)
    _move_to_blocks(columns, blocks)
    found = DocumentList(datasets, **{name: np.concatenate(parts) for name, parts in blocks.items()})
    if chosen is not None and chosen != found.num_chosen:
        raise RefusedError(f"{path}: has {found.num_chosen:,} of {chosen:,} documents; copy it again")
    bad = _first_disorder(found)
    if bad is not None:
        raise RefusedError(
            f"{path}: line {bad + 2}: dataset {found.dataset[bad]}, document {found.document[bad]}: it does not exist, "
            "or comes after a document of a higher number; sort the list, or write it again"
        )
    return found


def open_listed_datasets(path: str | os.PathLike[str], documents: DocumentList) -> list[IndexedDataset]:
    """Open the datasets of the list at `path`, in order.

    Raises:
        UserError: a file is missing.
        RefusedError: a dataset is damaged, or is not the one that the list was made of.
    """
    opened = []
    for listed in documents.datasets:
        dataset = IndexedDataset(_resolve(path, listed))
        if dataset.num_documents != listed.documents or not is_same_data(listed.fingerprint, fingerprint([dataset])):
            raise RefusedError(
                f"{dataset.prefix}: is not the dataset that {path} was made of ({dataset.num_documents:,} documents, "
                f"the list expects {listed.documents:,}, or other content); mine again, or restore the dataset"
            )
        opened.append(dataset)
    return opened


def listed_prefixes(path: str | os.PathLike[str]) -> list[str]:
    """Return the prefixes of the datasets of the list at `path`; see `read_document_list`."""
    return [_resolve(path, listed) for listed in read_document_list(path).datasets]


def _resolve(path: str | os.PathLike[str], listed: ListedDataset) -> str:
    return listed.path if is_remote(listed.path) else os.path.join(os.path.dirname(os.fspath(path)), listed.path)


def _line(dataset: int, document: int, distance: float, query: int) -> bytes:
    return orjson.dumps({"dataset": dataset, "document": document, "distance": distance, "query": query}) + b"\n"


def _read_header(path: str | os.PathLike[str], line: bytes) -> tuple[list[ListedDataset], int | None]:
    try:
        header = orjson.loads(line)
        if header["format"] != _FORMAT:
            raise KeyError("format")
        if _whole("version", header["version"]) > _VERSION:
            raise RefusedError(
                f"{path}: format version {header['version']}, this software reads up to {_VERSION}; update it"
            )
        datasets = [
            ListedDataset(
                _text("path", each["path"]),
                _whole("documents", each["documents"]),
                _text("fingerprint", each["fingerprint"]),
            )
            for each in header["datasets"]
        ]
        chosen = header.get("chosen")
        return datasets, None if chosen is None else _whole("chosen", chosen)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(
            f"{path}: line 1: its first line is not the header of a document list ({type(error).__name__}: {error}); "
            "give a list that `megatron-cpt mine` has written"
        ) from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(f"{name} is no text, or has a zero byte")
    return value


def _whole(name: str, value: Any, limit: int = _MOST) -> int:
    """Return a number of documents, or of one; numpy would wrap or refuse one that its type does not hold."""
    if type(value) is not int:
        raise TypeError(f"{name} is an integer")
    if not -1 <= value <= limit:
        raise ValueError(f"{name}: {value} is out of range")
    return value


def _append_line(path: str | os.PathLike[str], number: int, line: bytes, columns: dict[str, list[Any]]) -> None:
    try:
        row = orjson.loads(line)
        values = [
            _whole("dataset", row["dataset"], _MOST_DATASETS),
            _whole("document", row["document"]),
            _distance(row["distance"]),
            _whole("query", row["query"]),
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            f"{path}: line {number}: not a chosen document ({type(error).__name__}: {error}); copy the list again"
        ) from error
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _distance(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("distance is a number")
    if not abs(value) <= _FARTHEST:
        raise ValueError(f"distance: {value} is out of range")
    return float(value)


def _move_to_blocks(columns: dict[str, list[Any]], blocks: dict[str, list[npt.NDArray[Any]]]) -> None:
    """Turn the values so far into arrays, which take an eighth of the memory."""
    types = {"dataset": np.int32, "document": np.int64, "distance": np.float32, "query": np.int64}
    for name, values in columns.items():
        blocks[name].append(np.array(values, types[name]))
        values.clear()


def _first_disorder(documents: DocumentList) -> int | None:
    """Return the first document that does not exist or does not ascend; None if all are right."""
    sizes = np.array([dataset.documents for dataset in documents.datasets], np.int64)
    dataset, document = documents.dataset, documents.document
    exists = (dataset >= 0) & (dataset < len(sizes)) & (document >= 0)
    exists[exists] &= document[exists] < sizes[dataset[exists]]
    ascends = np.ones(len(document), np.bool_)
    ascends[1:] = (dataset[1:] > dataset[:-1]) | ((dataset[1:] == dataset[:-1]) & (document[1:] > document[:-1]))
    wrong = np.flatnonzero(~(exists & ascends))
    return int(wrong[0]) if wrong.size else None
