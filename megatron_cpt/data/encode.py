"""The work of `preprocess` that takes the time: blocks of JSONL lines in, flat arrays of ids out, on many cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.data.index_header import best_dtype
from megatron_cpt.data.jsonl import Block
from megatron_cpt.data.tokenizers import Tokenizer, load_tokenizer

_BLOCKS_PER_WORKER = 3  # one being encoded, one waiting for it, one on its way back


@dataclass(frozen=True)
class BadLine:
    """A line that gave no document, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class EncodedBlock:
    """What became of one block.

    Attributes:
        tokens: the ids of its documents one after another, in the type of the `.bin`.
        lengths: ids of each document, all above 0.
        text_bytes: UTF-8 bytes of their texts.
        empty_documents: lines whose text gives no token.
        bad_lines: lines without a text.
        bytes_done: as in the block.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    text_bytes: int
    empty_documents: int
    bad_lines: list[BadLine]
    bytes_done: int


class Encoder:
    """Turns blocks into ids.

    Args:
        tokenizer: what encodes the texts.
        key: the text's key in each line's object.
        append_eod: end each document with the tokenizer's end-of-document id.
    """

    def __init__(self, tokenizer: Tokenizer, key: str, append_eod: bool) -> None:
        assert not append_eod or tokenizer.eod_id is not None
        self._tokenizer = tokenizer
        self._key = key
        self._eod_id = tokenizer.eod_id if append_eod else None
        self._dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        """Parses and encodes one block."""
        texts, bad_lines = self._texts(block)
        tokens, lengths = self._tokenizer.encode_flat(texts)
        not_empty = lengths > 0  # with some tokenizers a text of blanks gives no token
        text_bytes = sum(len(text.encode()) for text, keep in zip(texts, not_empty.tolist(), strict=True) if keep)
        lengths = lengths[not_empty]
        if self._eod_id is not None:
            tokens = np.insert(tokens, np.cumsum(lengths), self._eod_id)
            lengths = lengths + 1
        num_empty = len(texts) - len(lengths)
        return EncodedBlock(tokens.astype(self._dtype), lengths, text_bytes, num_empty, bad_lines, block.bytes_done)

    def _texts(self, block: Block) -> tuple[list[str], list[BadLine]]:
        texts: list[str] = []
        bad_lines: list[BadLine] = []
        number = block.first_line - 1
        for number, line in enumerate(block.data.split(b"\n"), block.first_line):
            try:
                text = orjson.loads(line)[self._key]
                if type(text) is not str:
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    bad_lines.append(BadLine(block.path, number, _what_is_wrong(line, self._key)))
            else:
                texts.append(text)
        if block.damage is not None:  # found behind the block's last newline
            bad_lines.append(BadLine(block.path, number, block.damage))
        return texts, bad_lines


def encode_blocks(blocks: Iterable[Block], encoder: Encoder) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in this process."""
    for block in blocks:
        yield encoder(block)


def encode_blocks_in_pool(
    blocks: Iterable[Block], workers: int, tokenizer_spec: str, key: str, append_eod: bool
) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in `workers` processes and gives them back in order, with a bounded number under way.

    The processes are spawned, not forked: the caller may hold threads (a progress bar, a tokenizer's own).
    """
    context = multiprocessing.get_context("spawn")
    settings = (tokenizer_spec, key, append_eod)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    under_way: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            under_way.append(pool.submit(_encode_in_worker, block))
            if len(under_way) >= workers * _BLOCKS_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder | None = None  # of this worker process; None in every other


def _start_worker(tokenizer_spec: str, key: str, append_eod: bool) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, and it ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = Encoder(load_tokenizer(tokenizer_spec), key, append_eod)


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for blocks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: Block) -> EncodedBlock:
    assert _worker_encoder is not None
    return _worker_encoder(block)


def _what_is_wrong(line: bytes, key: str) -> str:
    """Why a line gives no text; only asked for lines that give none."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    if not isinstance(content, dict):
        return f"not an object, but a JSON {type(content).__name__}"
    if key not in content:
        return f"has no key {key!r}; it has {', '.join(map(repr, list(content)[:8])) or 'none'}"
    return f"the value of {key!r} is not a string, but {type(content[key]).__name__}"
