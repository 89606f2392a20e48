"""The work of `preprocess` that takes the time: blocks of the input in, flat arrays of ids out, on many cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions
from megatron_cpt.data.preprocess.parse import BadLine, parse_block
from megatron_cpt.data.preprocess.shared_memory import Room, SharedSlots
from megatron_cpt.data.tokenfile.header import best_dtype
from megatron_cpt.data.tokenizers.fast import TokenizerPlan, build_tokenizer
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import CptError

_BLOCKS_PER_WORKER = 3  # one being encoded, one waiting for it, one being written
_SLOT_GROWTH = 4  # bytes of ids for a byte of text: at most that many where a token has at least a byte

Allocate = Callable[[int, "np.dtype[Any]"], "npt.NDArray[Any]"]


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
        self._eod = np.array([tokenizer.eod_id], np.uint32) if options.append_eod else None
        self._dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block, empty: Allocate = np.empty) -> EncodedBlock:
        """Reads, parses and encodes one block; `empty` makes the arrays of ids."""
        parsed = parse_block(block, self._options.blocks)
        texts = [self._encode(texts, empty) for texts in parsed.texts]
        name = Block(block.file, block.path, block.position, block.end, block.bytes_done)
        return EncodedBlock(name, texts, parsed.bad_lines, parsed.num_ends, parsed.num_lines)

    def _encode(self, texts: list[str], empty: Allocate) -> EncodedTexts:
        documents = self._tokenizer.encode_arrays(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        not_empty = lengths > 0  # with some tokenizers a text of blanks gives no token
        text_bytes = sum(
            len(text) if text.isascii() else len(text.encode())
            for text, keep in zip(texts, not_empty.tolist(), strict=True)
            if keep
        )
        num_empty = len(texts) - int(not_empty.sum())
        if self._eod is not None:
            documents = list(chain.from_iterable((ids, self._eod) for ids in documents if ids.size))
            lengths = lengths + not_empty
        tokens = empty(int(lengths.sum()), self._dtype)
        if documents:  # unsafe: numpy does not know that every id is below the vocabulary's size
            np.concatenate(documents, out=tokens, casting="unsafe")
        if not self._options.keep_empty:
            lengths = lengths[not_empty]
        return EncodedTexts(tokens, lengths.astype(np.int32), text_bytes, num_empty)


def encode_blocks(blocks: Iterable[Block], encoder: Encoder) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in this process."""
    for block in blocks:
        yield encoder(block)


def encode_blocks_in_pool(
    blocks: Iterable[Block], workers: int, plan: TokenizerPlan, options: EncodeOptions
) -> Generator[EncodedBlock, None, None]:
    """Encodes blocks in `workers` processes and gives them back in order, with a bounded number under way.

    The arrays of ids of a block hold until the next block is asked for: then their memory is used again.

    The processes are spawned, not forked: the caller may hold threads (a progress bar, a tokenizer's own).

    Raises:
        WorkerLostError: a worker was killed from outside, most likely for the memory it used.
    """
    context = multiprocessing.get_context("spawn")
    num_slots = workers * _BLOCKS_PER_WORKER
    slots = SharedSlots(num_slots, _SLOT_GROWTH * options.blocks.block_bytes)
    arguments = (plan, options, slots)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    under_way: deque[tuple[int, Future[_Sent]]] = deque()
    try:
        for number, block in enumerate(blocks):
            slot = number % num_slots  # that of the block given back last, or one not used yet
            under_way.append((slot, pool.submit(_encode_in_worker, block, slot)))
            if len(under_way) == num_slots:
                yield _received(slots, *under_way.popleft())
        while under_way:
            yield _received(slots, *under_way.popleft())
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process ended without a word: killed from outside, or out of memory; the same command goes on "
            "where it was, with fewer --workers where memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        slots.close()


@dataclass(frozen=True)
class _Sent:
    """A block on its way: where in its slot the ids of each key lie; None: with the block itself."""

    result: EncodedBlock
    places: list[tuple[int, int] | None]


def _received(slots: SharedSlots, slot: int, future: Future[_Sent]) -> EncodedBlock:
    sent = future.result()
    texts = []
    for of_key, place in zip(sent.result.texts, sent.places, strict=True):
        if place is not None:
            offset, num_bytes = place
            tokens = slots.slot(slot)[offset : offset + num_bytes].view(of_key.tokens.dtype)
            of_key = replace(of_key, tokens=tokens)
        texts.append(of_key)
    return replace(sent.result, texts=texts)


_worker: tuple[Encoder, SharedSlots] | None = None  # of this worker process; None in every other


def _start_worker(plan: TokenizerPlan, options: EncodeOptions, slots: SharedSlots) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, and it ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (Encoder(build_tokenizer(plan), options), slots)


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for blocks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: Block, slot: int) -> _Sent:
    assert _worker is not None
    encoder, slots = _worker
    room = Room(slots.slot(slot))
    result = encoder(block, room.empty)
    texts, places = [], list[tuple[int, int] | None]()
    for of_key in result.texts:
        offset = room.offset_of(of_key.tokens)
        places.append(None if offset is None else (offset, of_key.tokens.nbytes))
        texts.append(of_key if offset is None else replace(of_key, tokens=of_key.tokens[:0]))
    return _Sent(replace(result, texts=texts), places)
