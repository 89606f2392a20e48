"""Read, parse and encode blocks of the input into flat arrays of token ids: here, in many workers, or on Ray."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, compress
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions
from megatron_cpt.data.preprocess.parse import BadLine, parse_block
from megatron_cpt.data.ray_engine import connect_ray, enter_folder
from megatron_cpt.data.tokenfile.header import best_dtype
from megatron_cpt.data.tokenfile.sidecar import own_versions
from megatron_cpt.data.tokenizers.fast import TokenizerPlan, build_tokenizer
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.worker_process import prepare_worker

_BLOCKS_PER_WORKER = 3  # in flight: one being encoded, one waiting, one being written
_ALIGNMENT = 8
_ID_BYTES_PER_TEXT_BYTE = 4  # the most: an id takes 4 bytes, and a token stands for at least one byte of text

Allocate = Callable[[int, "np.dtype[Any]"], "npt.NDArray[Any]"]


_SentBlock = tuple["EncodedBlock", list[int | None]]
"""Result without the ids that are in the slot, and the offset of these ids per key; None: the ids are in the result."""


class WorkerLostError(CptError):
    """A worker process died; the saved progress is kept."""


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of the encoding.

    Attributes:
        before: ids at the beginning of each document.
        after: ids at the end of each document.
        template: ids of the tokenizer's template around each text, empty texts included; they stand inside the others.
        keep_empty: see `PreprocessOptions`.
    """

    blocks: BlockOptions
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    template: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    keep_empty: bool = False


@dataclass(frozen=True)
class EncodedTexts:
    """Documents of one key in a block.

    Attributes:
        tokens: ids of all documents one after another, in the token type of the `.bin`.
        lengths: ids per document; 0 only for empty documents that are kept.
        text_bytes: UTF-8 bytes of the documents' texts.
        num_empty: texts without a token.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    text_bytes: int
    num_empty: int


@dataclass(frozen=True)
class EncodedBlock:
    """Result of one block, as in `ParsedBlock`, with the documents per key; `block` comes without its data."""

    block: Block
    texts: list[EncodedTexts]
    bad_lines: list[BadLine]
    num_ends: int
    num_lines: int
    num_bytes: int


@dataclass(frozen=True)
class RayOptions:
    """Ray cluster that encodes.

    Attributes:
        address: address of a running cluster; None: one is started on this machine.
        num_cpus: CPUs to use; None: all of the cluster or machine.
    """

    address: str | None = None
    num_cpus: int | None = None


class Encoder:
    """Encoder of whole blocks."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        first, last = options.template
        self._has_template = bool(first or last)
        self._before = np.array([*options.before, *first], np.uint32)
        self._after = np.array([*last, *options.after], np.uint32)
        self._dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block, allocate: Allocate = np.empty) -> EncodedBlock:
        """Read, parse and encode one block; `allocate` makes the arrays of ids."""
        parsed = parse_block(block, self._options.blocks)
        texts = [self._encode(texts, allocate) for texts in parsed.texts]
        without_data = replace(block, lines=None, rows=None, values=None)
        return EncodedBlock(without_data, texts, parsed.bad_lines, parsed.num_ends, parsed.num_lines, parsed.num_bytes)

    def _encode(self, texts: list[str], allocate: Allocate) -> EncodedTexts:
        documents = self._tokenizer.encode_arrays(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        not_empty = (lengths > 0) | self._has_template  # some tokenizers give no token for a text of blanks
        text_bytes = sum(
            len(text) if text.isascii() else len(text.encode())
            for text, keep in zip(texts, not_empty.tolist(), strict=True)
            if keep
        )
        num_empty = len(texts) - int(not_empty.sum())
        num_added = self._before.size + self._after.size
        if num_added:
            before, after = [self._before] * bool(self._before.size), [self._after] * bool(self._after.size)
            kept = compress(documents, not_empty.tolist())
            documents = list(chain.from_iterable((*before, ids, *after) for ids in kept))
            lengths = lengths + num_added * not_empty
        tokens = allocate(int(lengths.sum()), self._dtype)
        if documents:  # "unsafe" is safe: every id is below the vocabulary size, so it fits the type
            np.concatenate(documents, out=tokens, casting="unsafe")
        if not self._options.keep_empty:
            lengths = lengths[not_empty]
        return EncodedTexts(tokens, lengths.astype(np.int32), text_bytes, num_empty)


def encode_blocks_in_pool(
    blocks: Iterable[Block], workers: int, plan: TokenizerPlan, options: EncodeOptions
) -> Generator[EncodedBlock, None, None]:
    """Encode blocks in `workers` processes and yield the results in order, with a bounded number of blocks in flight.

    The arrays of ids of a block are valid until the next block is requested; then their memory is reused. The processes
    are spawned, not forked, because the caller may have threads (a progress bar, a tokenizer's own).

    Raises:
        WorkerLostError: a worker was killed from outside, most likely because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    num_slots = workers * _BLOCKS_PER_WORKER
    slots = SharedSlots(num_slots, _ID_BYTES_PER_TEXT_BYTE * options.blocks.block_bytes)
    arguments = (plan, options, slots)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    in_flight: deque[tuple[int, Future[_SentBlock]]] = deque()
    try:
        for number, block in enumerate(blocks):
            slot = number % num_slots  # free: its block was yielded before, and the caller is done with it
            in_flight.append((slot, pool.submit(_encode_in_worker, block, slot)))
            if len(in_flight) == num_slots:
                yield _received(slots, *in_flight.popleft())
        while in_flight:
            yield _received(slots, *in_flight.popleft())
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process was killed from outside or ran out of memory; run the same command again to resume, with "
            "fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        slots.close()


def _received(slots: SharedSlots, slot: int, future: Future[_SentBlock]) -> EncodedBlock:
    result, offsets = future.result()
    for number, offset in enumerate(offsets):
        if offset is not None:
            texts = result.texts[number]
            tokens = np.frombuffer(slots.slot(slot), texts.tokens.dtype, int(texts.lengths.sum()), offset)
            result.texts[number] = replace(texts, tokens=tokens)
    return result


_worker: tuple[Encoder, SharedSlots] | None = None  # set in worker processes only


def _start_worker(plan: TokenizerPlan, options: EncodeOptions, slots: SharedSlots) -> None:
    global _worker
    prepare_worker()
    _worker = (Encoder(build_tokenizer(plan), options), slots)


def _encode_in_worker(block: Block, slot: int) -> _SentBlock:
    assert _worker is not None
    encoder, slots = _worker
    allocator = SlotAllocator(slots.slot(slot))
    result = encoder(block, allocator.empty)
    offsets = [allocator.offset_of(texts.tokens) for texts in result.texts]
    for number, offset in enumerate(offsets):
        if offset is not None:
            result.texts[number] = replace(result.texts[number], tokens=result.texts[number].tokens[:0])
    return result, offsets


def encode_blocks_on_ray(
    blocks: Iterable[Block],
    engine: RayOptions,
    plan: TokenizerPlan,
    options: EncodeOptions,
    versions: Mapping[str, str],
) -> Generator[EncodedBlock, None, None]:
    """Encode blocks on a Ray cluster and yield the results in order, with a bounded number of blocks in flight.

    Every node needs the input files and the tokenizer under the same paths.

    Args:
        versions: versions of the packages that make the ids; each node must have the same ones.

    Raises:
        RayFailedError: Ray does not start, or the worker of a block died too often.
        UserError: there is no cluster at the address, or a node lacks the folder of the command or has other versions.
    """
    bytes_per_cpu = _BLOCKS_PER_WORKER * options.blocks.block_bytes * (1 + _ID_BYTES_PER_TEXT_BYTE)
    with connect_ray(engine.address, num_cpus=engine.num_cpus, bytes_per_cpu=bytes_per_cpu) as cluster:
        common = (uuid.uuid4().hex, os.getcwd(), plan, options, versions)
        yield from cluster.map_in_order(encode_on_ray, blocks, common, in_flight=_BLOCKS_PER_WORKER * cluster.num_cpus)


_ray_encoder: tuple[str, Encoder] | None = None  # run and its encoder, set in Ray's worker processes only


def encode_on_ray(
    block: Block, run: str, folder: str, plan: TokenizerPlan, options: EncodeOptions, versions: Mapping[str, str]
) -> EncodedBlock:
    """Encode one block in a worker process of Ray, which keeps the encoder of one run.

    Args:
        run: id of the run.
        folder: working directory of the command.
        versions: as for `encode_blocks_on_ray`.

    Raises:
        UserError: the node has other versions of the packages, or lacks the folder.
    """
    global _ray_encoder
    if _ray_encoder is None or _ray_encoder[0] != run:
        own = own_versions(*(name for name in versions if name != "megatron_cpt"))
        if own != versions:
            raise UserError(
                f"Ray node {os.uname().nodename} has {own}, this machine has {dict(versions)}: ids may differ; install "
                "the same versions on every node"
            )
        enter_folder(folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        _ray_encoder = (run, Encoder(build_tokenizer(plan), options))
    return _ray_encoder[1](block)


class SharedSlots:
    """Shared memory in `count` slots of `slot_bytes` each, one slot per block in flight.

    A pipe would copy each array four times. The memory is anonymous, not a file in /dev/shm, which containers keep
    small. It can be pickled for a spawned process. Only pages that were written take up memory of the machine.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._fd = os.memfd_create("tokens")
        os.ftruncate(self._fd, count * slot_bytes)
        self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"fd": reduction.DupFd(self._fd), "slot_bytes": self._slot_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slot_bytes = state["slot_bytes"]
        self._fd = state["fd"].detach()
        self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)

    def slot(self, number: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of a slot."""
        return self._bytes[number * self._slot_bytes : (number + 1) * self._slot_bytes]

    def close(self) -> None:
        """Close the descriptor: no further process can be given the memory; existing arrays stay valid."""
        os.close(self._fd)


class SlotAllocator:
    """Allocator of arrays inside a slot, and in ordinary memory once the slot is full."""

    def __init__(self, slot: npt.NDArray[np.uint8]) -> None:
        self._slot, self._used = slot, 0

    def empty(self, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an uninitialized array of `count` numbers."""
        begin, num_bytes = self._used, count * dtype.itemsize
        if begin + num_bytes > self._slot.size:
            return np.empty(count, dtype)
        self._used = -(-(begin + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        return self._slot[begin : begin + num_bytes].view(dtype)

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Return the byte of the slot where an array begins; None if it lies outside the slot."""
        offset = array.ctypes.data - self._slot.ctypes.data
        return offset if 0 <= offset < self._slot.size and array.size else None
