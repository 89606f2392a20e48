"""Held-out sets to compare training data with: token files, or JSON Lines as benchmarks come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.data.tokenfile.documents import document_blocks
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import RefusedError, UserError

_JSON_LINES = (".jsonl", ".json")


def held_out_documents(
    inputs: Sequence[str], tokenizer: Tokenizer | None, keys: Sequence[str] = ("text",)
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The documents of token files and of JSON Lines.

    Args:
        inputs: prefixes of .bin/.idx, globs of them, or files that end in .jsonl or .json.
        tokenizer: encodes JSON Lines; it must be that of the training data.
        keys: the fields of a line that hold text; each is a document of its own, and lines without it are passed over.

    Yields:
        name, ids: `prefix[number]` or `file:line:key`.

    Raises:
        UserError: a file is missing, or there is no tokenizer to encode JSON Lines.
        RefusedError: a file is damaged.
    """
    for name in inputs:
        if name.endswith(_JSON_LINES):
            if tokenizer is None:
                raise UserError(f"{name}: text needs the tokenizer of the training data: give --tokenizer KIND:PATH")
            yield from _json_lines(name, tokenizer, keys)
        else:
            for prefix in expand_prefixes(name):
                for block in document_blocks(IndexedDataset(prefix)):
                    for place in range(block.num_documents):
                        yield f"{prefix}[{block.first + place}]", block.document(place)


def _json_lines(path: str, tokenizer: Tokenizer, keys: Sequence[str]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}")
    found = False
    with open(path, "rb") as file:
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
                    found = True
                    yield f"{path}:{number}:{key}", np.array(tokenizer.encode(text), np.int64)
    if not found:
        raise UserError(f"{path}: no line has text under {' or '.join(keys)}; name the fields with --key")
