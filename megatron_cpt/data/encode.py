"""The work of `preprocess` that takes the time: blocks of the input in, flat arrays of ids out, on many cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.blocks import Block, BlockOptions
from megatron_cpt.data.documents import BadLine, parse_block
from megatron_cpt.data.fast_tokenizer import TokenizerPlan, build_tokenizer
from megatron_cpt.data.index_header import best_dtype
from megatron_cpt.data.tokenizers import Tokenizer
from megatron_cpt.errors import CptError

_BLOCKS_PER_WORKER = 3  # one being encoded, one waiting for it, one on its way back


class WorkerLostError(CptError):
    """A worker process died; what was done so far is kept."""


@dataclass(frozen=True)
class EncodeOptions:
    """What is made of a text.

    Attributes:
        blocks: the keys, and how the input was cut.
        append_eod: end each document with the tokenizer's end-of-document id.
        keep_empty: keep a text without tokens as a document without sequences, as Megatron-LM's tool does.
    """

    blocks: BlockOptions
    append_eod: bool = False
    keep_empty: bool = False


@dataclass(frozen=True)
class EncodedTexts:
    """The documents that one key gave in a block.

    Attributes:
        tokens: their ids one after another, in the type of the `.bin`.
        lengths: ids of each document; 0 only for empty ones that are kept.
        text_bytes: UTF-8 bytes of their texts.
        num_empty: texts that gave no token.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    text_bytes: int
    num_empty: int


@dataclass(frozen=True)
class EncodedBlock:
    """What became of one block.

    Attributes:
        block: the block, without its data.
        texts: by key, in the order of the keys.
        bad_lines: lines or rows without a text; their numbers count from the block's beginning, the first is 1.
        num_ends: line ends (or rows) in the block.
        num_lines: lines that are not blank.
    """

    block: Block
    texts: list[EncodedTexts]
    bad_lines: list[BadLine]
    num_ends: int
    num_lines: int


class Encoder:
    """Turns blocks into ids.

    Args:
        tokenizer: what encodes the texts.
        options: the keys, and what is made of a text.
    """

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        assert not options.append_eod or tokenizer.eod_id is not None
        self._tokenizer = tokenizer
        self._options = options
        self._eod_id = tokenizer.eod_id if options.append_eod else None
        self._dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        """Reads, parses and encodes one block."""
        parsed = parse_block(block, self._options.blocks)
        texts = [self._encode(texts) for texts in parsed.texts]
        name = Block(block.file, block.path, block.position, block.end, block.bytes_done)
        return EncodedBlock(name, texts, parsed.bad_lines, parsed.num_ends, parsed.num_lines)

    def _encode(self, texts: list[str]) -> EncodedTexts:
        tokens, lengths = self._tokenizer.encode_flat(texts)
        not_empty = lengths > 0  # with some tokenizers a text of blanks gives no token
        text_bytes = sum(
            len(text) if text.isascii() else len(text.encode())
            for text, keep in zip(texts, not_empty.tolist(), strict=True)
            if keep
        )
        num_empty = len(texts) - int(not_empty.sum())
        if self._eod_id is not None:
            tokens = np.insert(tokens, np.cumsum(lengths)[not_empty], self._eod_id)
            lengths = lengths + not_empty
        if not self._options.keep_empty:
            lengths = lengths[not_empty]
        return EncodedTexts(tokens.astype(self._dtype), lengths.astype(np.int32), text_bytes, num_empty)


def encode_blocks(blocks: Iterable[Block], encoder: Encoder) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in this process."""
    for block in blocks:
        yield encoder(block)


def encode_blocks_in_pool(
    blocks: Iterable[Block], workers: int, plan: TokenizerPlan, options: EncodeOptions
) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in `workers` processes and gives them back in order, with a bounded number under way.

    The processes are spawned, not forked: the caller may hold threads (a progress bar, a tokenizer's own).

    Raises:
        WorkerLostError: a worker was killed from outside, most likely for the memory it used.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plan, options))
    under_way: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            under_way.append(pool.submit(_encode_in_worker, block))
            if len(under_way) >= workers * _BLOCKS_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process ended without a word: killed from outside, or out of memory; the same command goes on "
            "where it was, with fewer --workers where memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder | None = None  # of this worker process; None in every other


def _start_worker(plan: TokenizerPlan, options: EncodeOptions) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, and it ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = Encoder(build_tokenizer(plan), options)


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for blocks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: Block) -> EncodedBlock:
    assert _worker_encoder is not None
    return _worker_encoder(block)
