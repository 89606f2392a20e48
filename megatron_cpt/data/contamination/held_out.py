"""Reader of held-out documents: token files, or JSON Lines as benchmarks have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.data.tokenfile.documents import document_blocks
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import FileIdentity
from megatron_cpt.files.whole_io import is_regular_file, open_reader

JSON_LINES = (".jsonl", ".json")


def held_out_documents(
    inputs: Sequence[str], tokenizer: Tokenizer | None, keys: Sequence[str] = ("text",)
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the documents of token files and JSON Lines.

    Args:
        inputs: prefixes of .bin/.idx, globs of prefixes, or files that end in .jsonl or .json.
        tokenizer: tokenizer of the training data, which encodes JSON Lines.
        keys: fields of a line that hold text. Each field is a document; lines without the field are skipped.

    Yields:
        Name and ids of a document. The name is `prefix[number]` or `file:line:key`.

    Raises:
        UserError: a file is missing or has no text, or JSON Lines are given without a tokenizer.
        RefusedError: a file is damaged.
        ChangedFileError: a file changed while it was read.
    """
    for name in inputs:
        if name.endswith(JSON_LINES):
            if tokenizer is None:
                raise UserError(f"{name}: text needs the tokenizer of the training data: give --tokenizer KIND:PATH")
            yield from _json_lines(name, tokenizer, keys)
        else:
            for prefix in expand_prefixes(name):
                dataset = IndexedDataset(prefix)
                if not dataset.num_tokens:
                    raise UserError(f"{prefix}: has no tokens, so nothing would be compared; give held-out documents")
                for block in document_blocks(dataset):
                    for index in range(block.num_documents):
                        yield f"{prefix}[{block.first + index}]", block.document(index)
                dataset.check_unchanged()


def _json_lines(path: str, tokenizer: Tokenizer, keys: Sequence[str]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if not is_regular_file(path):
        raise UserError(f"no such file: {path}")
    has_text, identity = False, FileIdentity.read(path)
    with open_reader(path) as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                raise RefusedError(f"{path}: line {number}: not JSON: {error}") from error
            for key in keys:
                text = line.get(key) if isinstance(line, dict) else None
                if isinstance(text, str):
                    has_text = has_text or bool(text.strip())
                    yield f"{path}:{number}:{key}", np.array(tokenizer.encode(text), np.int64)
    identity.check()
    if not has_text:
        raise UserError(f"{path}: no line has text under {' or '.join(keys)}; name the fields with --key")
