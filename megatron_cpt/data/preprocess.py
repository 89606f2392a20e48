"""JSONL to `.bin`/`.idx`, as fast as the tokenizer allows.

This process cuts the files into blocks of whole lines and writes; workers (`encode.py`) parse and encode a block each
and send back flat arrays. Only a few blocks are under way at a time, so memory stays the same for a gigabyte and for
a terabyte.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO

import orjson

from megatron_cpt.data.encode import BadLine, Encoder, encode_blocks, encode_blocks_in_pool
from megatron_cpt.data.index_header import best_dtype
from megatron_cpt.data.index_writer import IndexedDatasetWriter
from megatron_cpt.data.jsonl import Block, expand_inputs, read_blocks
from megatron_cpt.data.tokenizers import load_tokenizer
from megatron_cpt.errors import RefusedError, UserError

Progress = Callable[[int, int, int, int], None]

_SHOWN = 5  # bad lines in an error message


@dataclass(frozen=True)
class PreprocessReport:
    """What `preprocess` did.

    Attributes:
        output_prefix: the new data set.
        dtype: its token type.
        documents: documents written.
        tokens: tokens written, ends of documents included.
        text_bytes: UTF-8 bytes of the documents' texts.
        input_bytes: size of the input files on disk.
        empty_documents: left out, for their text is empty or gives no token.
        bad_lines: lines left out, for they hold no text under the key.
        bad_path: where these are listed, each with file, line and reason; None if there are none.
        seconds: wall-clock time.
    """

    output_prefix: str
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    input_bytes: int
    empty_documents: int
    bad_lines: int
    bad_path: str | None
    seconds: float


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer_spec: str,
    *,
    key: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    max_bad: int | None = None,
    overwrite: bool = False,
) -> PreprocessReport:
    """Encodes the texts of JSONL files into one data set; documents keep their order.

    Nothing appears under the final names until all of it is written.

    Args:
        inputs: `.jsonl` or `.json` files of one JSON object a line, also with `.gz` or `.zst`; globs are expanded.
        output_prefix: the data set is OUTPUT_PREFIX.bin and .idx; bad lines are listed in OUTPUT_PREFIX.bad.jsonl.
        tokenizer_spec: `KIND:PATH`, see `load_tokenizer`.
        key: the text's key in each object.
        append_eod: end each document with the tokenizer's end-of-document id.
        workers: processes that encode. With 1 this process does it itself; with more, a script that calls this needs
            the `if __name__ == "__main__"` guard.
        progress: called after each block with (input bytes done, input bytes in all, documents, tokens).
        max_bad: give up when there are more bad lines than this; None: however many.
        overwrite: replace a data set that is already there.

    Raises:
        UserError: a file is missing, the output exists, the tokenizer has no end of document, or no line has a text.
        RefusedError: more bad lines than `max_bad`.
    """
    started = time.monotonic()
    prefix, files = os.fspath(output_prefix), expand_inputs(inputs)
    there = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(path)]
    if there and not overwrite:
        raise UserError(f"{' and '.join(there)}: already there; choose another output prefix, or allow overwriting")
    tokenizer = load_tokenizer(tokenizer_spec)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {tokenizer_spec}: has no end-of-document id to append; leave append_eod out")
    blocks = _all_blocks(files)
    if workers > 1:
        results = encode_blocks_in_pool(blocks, workers, tokenizer_spec, key, append_eod)
    else:
        results = encode_blocks(blocks, Encoder(tokenizer, key, append_eod))
    input_bytes = sum(map(os.path.getsize, files))
    text_bytes = empty = 0
    # Left in the reverse order: the workers end, the data set is published, then the list of bad lines.
    with (
        _BadLineList(f"{prefix}.bad.jsonl", max_bad) as bad_lines,
        IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size)) as writer,
        contextlib.closing(results),
    ):
        for result in results:
            writer.add_documents(result.tokens, result.lengths)
            bad_lines.add(result.bad_lines)
            text_bytes += result.text_bytes
            empty += result.empty_documents
            if progress is not None:
                progress(result.bytes_done, input_bytes, writer.num_documents, writer.num_tokens)
        if writer.num_documents == 0:
            raise UserError(f"no document in {', '.join(files)}: {empty} empty, {bad_lines.summary()}")
    return PreprocessReport(
        output_prefix=prefix,
        dtype=writer.dtype.name,
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        text_bytes=text_bytes,
        input_bytes=input_bytes,
        empty_documents=empty,
        bad_lines=bad_lines.count,
        bad_path=bad_lines.path if bad_lines.count else None,
        seconds=time.monotonic() - started,
    )


def _all_blocks(files: Sequence[str]) -> Iterator[Block]:
    """The blocks of all files, with `bytes_done` counted over all of them."""
    bytes_before = 0
    for file in files:
        for block in read_blocks(file):
            yield replace(block, bytes_done=bytes_before + block.bytes_done)
        bytes_before += os.path.getsize(file)


class _BadLineList:
    """Writes bad lines to a file as they come, published on a clean exit if there are any, else removed."""

    def __init__(self, path: str, max_bad: int | None) -> None:
        self.path = path
        self.count = 0
        self._max_bad = max_bad
        self._first: list[BadLine] = []
        self._temporary = f"{path}.tmp-{os.getpid()}"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _BadLineList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            _remove(self._temporary)
        elif self._file is not None:
            os.replace(self._temporary, self.path)
        else:
            _remove(self.path)  # of a data set that was replaced

    def add(self, lines: Sequence[BadLine]) -> None:
        """Appends lines.

        Raises:
            RefusedError: there are too many now.
        """
        if lines and self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed on exit)
        for line in lines:
            assert self._file is not None
            self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._first += lines[: max(0, _SHOWN - len(self._first))]
        self.count += len(lines)
        if self._max_bad is not None and self.count > self._max_bad:
            raise RefusedError(f"nothing is written: more than {self._max_bad} bad lines ({self.summary()})")

    def summary(self) -> str:
        """Their number so far, and the first few."""
        shown = "; ".join(f"{line.file}:{line.line}: {line.reason}" for line in self._first)
        return f"{self.count} bad{': ' if shown else ''}{shown}"


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
