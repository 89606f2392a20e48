"""Texts to embed: the beginnings of documents, and the queries."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.contamination.held_out import JSON_LINES, held_out_documents
from megatron_cpt.data.preprocess.inputs import BlockOptions, InputFiles, expand_inputs, read_blocks
from megatron_cpt.data.preprocess.parse import parse_block
from megatron_cpt.data.tokenfile.document_list import is_document_list
from megatron_cpt.data.tokenfile.documents import document_bounds
from megatron_cpt.data.tokenfile.header import refuse
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes, find_repeated
from megatron_cpt.data.tokenfile.sidecar import Origin, read_sidecar
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.remote import is_file
from megatron_cpt.files.whole_io import is_folder

_BATCH = 1024  # documents
_CHARACTERS_PER_ID = 3  # fewer than usual, so that one attempt is enough for most texts


def is_dataset(name: str) -> bool:
    """Return whether a name is a prefix of .bin/.idx or a glob of prefixes, rather than a file of text."""
    stem = name[:-4] if name.endswith((".bin", ".idx")) else name
    return stem != name or is_file(f"{stem}.idx") or any(is_file(f"{each}.idx") for each in _matches(stem))


def corpus_prefixes(corpus: Sequence[str]) -> list[str]:
    """Return the prefixes of the datasets of a corpus.

    Raises:
        UserError: a dataset occurs twice.
    """
    prefixes = [prefix for name in corpus if is_dataset(name) for prefix in expand_prefixes(name)]
    if twice := find_repeated(prefixes):
        raise _repeated(twice)
    return prefixes


def corpus_texts(corpus: Sequence[str]) -> list[str]:
    """Return the text files of a corpus.

    Raises:
        UserError: a file is missing, or occurs twice.
    """
    names = [name for name in corpus if not is_dataset(name)]
    files = expand_inputs(names) if names else []
    counts = Counter(map(os.path.realpath, files))
    if twice := sorted({file for file in files if counts[os.path.realpath(file)] > 1}):
        raise _repeated(twice)
    return files


def _repeated(names: Sequence[str]) -> UserError:
    return UserError(
        f"corpus: {', '.join(names)} is named more than once; give it once, or its copies take places of the k nearest"
    )


def input_files(queries: Sequence[str], corpus: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Return the paths of all files that a call reads.

    Raises:
        UserError: a text file is missing, a glob has no match, a document list is given, or the corpus has a dataset or
            file twice.
    """
    for role, names in (("queries", queries), ("corpus", corpus), ("held-out", held_out)):
        lists = [name for name in names if is_document_list(name) and not is_dataset(name) and not is_folder(name)]
        if lists:
            raise UserError(
                f"{role} {', '.join(lists)}: a document list cannot be used here; give the prefixes of whole datasets, "
                "such as the ones that its first line names"
            )
    texts = [name for name in queries if not is_dataset(name)]
    lines = [name for name in held_out if name.endswith(JSON_LINES)]
    datasets = [name for name in queries if is_dataset(name)]
    datasets += [name for name in held_out if not name.endswith(JSON_LINES)]
    prefixes = [*corpus_prefixes(corpus), *(prefix for name in datasets for prefix in expand_prefixes(name))]
    return [
        *corpus_texts(corpus),
        *(expand_inputs(texts) if texts else ()),
        *lines,
        *(f"{prefix}{end}" for prefix in prefixes for end in (".bin", ".idx")),
    ]


def find_tokenizer(datasets: Sequence[IndexedDataset], spec: str | None) -> tuple[str, Tokenizer]:
    """Return the tokenizer of datasets: the named one, or else the one that their sidecars name.

    Raises:
        UserError: neither names one, or its files are missing.
        RefusedError: the ids of a dataset are of another tokenizer.
    """
    origins = [(dataset.prefix, origin) for dataset in datasets if (origin := read_origin(dataset)).tokenizer]
    if spec is None:
        if not origins:
            raise UserError("no sidecar names the tokenizer of the ids; give --tokenizer KIND:PATH")
        spec = str(origins[0][1].tokenizer)
    tokenizer = load_tokenizer(spec)
    for prefix, origin in origins:
        if origin.fingerprint not in (None, tokenizer.fingerprint):
            raise RefusedError(
                f"{prefix}: its ids are of tokenizer {origin.name}, not of {spec}; give that one with --tokenizer, and "
                "mine datasets of different tokenizers separately"
            )
    return spec, tokenizer


def read_origin(dataset: IndexedDataset) -> Origin:
    """Return what the sidecar says about a dataset; nothing is known without one."""
    sidecar = read_sidecar(dataset.header)
    return Origin() if sidecar is None else sidecar.origin


class DocumentTexts:
    """Texts of a dataset's documents.

    Args:
        eod_id: id that ends documents and belongs to no text.
    """

    def __init__(self, dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
        self.dataset, self._tokenizer = dataset, tokenizer
        origin = read_origin(dataset)
        self.eod_id = tokenizer.eod_id if origin.eod_id is None else origin.eod_id

    def ids(self, number: int) -> npt.NDArray[Any]:
        """Return the ids of a document, without the id that ends it."""
        return self._without_eod(self.dataset.document(number))

    def start(self, number: int, characters: int) -> str:
        """Return the first characters of a document."""
        return self.starts(number, number + 1, characters)[0]

    def starts(self, first: int, stop: int, characters: int) -> list[str]:
        """Return the first characters of the documents [first, stop); no more ids than characters are read."""
        texts: list[str] = []
        for begin in range(first, stop, _BATCH):
            bounds = document_bounds(self.dataset, begin, min(begin + _BATCH, stop))
            lengths = np.minimum(np.diff(bounds), characters + 1).tolist()
            rows = [np.empty(length, self.dataset.dtype) for length in lengths]
            self.dataset.read_rows(bounds[:-1].tolist(), rows)
            texts += [self._decode_start(row, characters) for row in rows]
        return texts

    def _without_eod(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return ids[:-1] if len(ids) and int(ids[-1]) == self.eod_id else ids

    def _decode_start(self, ids: npt.NDArray[Any], characters: int) -> str:
        ids = self._without_eod(ids)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            raise refuse(
                f"{self.dataset.prefix}.bin", f"has ids outside the vocabulary of {self._tokenizer.vocab_size}"
            )
        count = max(1, characters // _CHARACTERS_PER_ID)
        while True:
            text = self._tokenizer.decode(ids[:count].tolist())
            if len(text) >= characters or count >= len(ids):
                return text[:characters]
            count *= 2


def read_held_out(
    names: Sequence[str], tokenizer: Tokenizer, keys: Sequence[str]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield name and ids of held-out documents; see `held_out_documents`.

    Raises:
        UserError: a file is missing, or has no text.
        RefusedError: a file is damaged, or the ids of a dataset are of another tokenizer.
    """
    for prefix in (each for name in names if not name.endswith(JSON_LINES) for each in expand_prefixes(name)):
        origin = read_origin(IndexedDataset(prefix))
        if origin.fingerprint not in (None, tokenizer.fingerprint):
            raise RefusedError(
                f"held-out {prefix}: its ids are of tokenizer {origin.name}, not of the corpus's, so no text would be "
                "found; encode its text with the tokenizer of the corpus"
            )
    yield from held_out_documents(names, tokenizer, keys)


def read_queries(names: Sequence[str], tokenizer: str | None, keys: Sequence[str]) -> list[str]:
    """Return the text of each query.

    Args:
        names: prefixes of .bin/.idx, globs of them, or text files in the formats of `preprocess`.
        tokenizer: KIND:PATH for datasets without a sidecar.
        keys: fields of a text file's lines; several are joined by line ends, such as a question and its answer.

    Raises:
        UserError: a file is missing, or there is no query.
        RefusedError: a file is damaged, or a line lacks a field.
    """
    queries: list[str] = []
    for name in names:
        if is_dataset(name):
            datasets = [IndexedDataset(prefix) for prefix in expand_prefixes(name)]
            _, codec = find_tokenizer(datasets, None if read_origin(datasets[0]).tokenizer else tokenizer)
            for dataset in datasets:
                texts = DocumentTexts(dataset, codec)
                queries += [codec.decode(texts.ids(number).tolist()) for number in range(dataset.num_documents)]
                dataset.check_unchanged()
        else:
            queries += _read_texts(name, keys)
    if not queries:
        raise UserError(f"queries {', '.join(names)}: no query in them; give at least one question")
    return queries


def _read_texts(name: str, keys: Sequence[str]) -> list[str]:
    files, options = InputFiles.of(expand_inputs([name])), BlockOptions(tuple(keys))
    texts: list[str] = []
    for block in read_blocks(files, options):
        parsed = parse_block(block, options)
        problem = block.damage or (parsed.bad_lines[0].reason if parsed.bad_lines else None)
        if problem is not None:
            raise RefusedError(
                f"queries {block.path}: {problem}; fix the file, or name the fields that hold the text with --key"
            )
        texts += ["\n".join(fields) for fields in zip(*parsed.texts, strict=True)]
    return texts


def _matches(stem: str) -> list[str]:
    try:
        return expand_prefixes(stem)
    except UserError:  # a glob of text files
        return []
