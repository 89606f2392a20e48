"""A run of `preprocess` from its first block to its last: encoded, put away, counted, saved now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout
from megatron_cpt.data.preprocess.block import Cursor
from megatron_cpt.data.preprocess.buckets import OrderedSink, ShuffledSink, Sink
from megatron_cpt.data.preprocess.inputs import InputFiles, Shard
from megatron_cpt.data.preprocess.read_blocks import read_blocks
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import (
    EncodedBlock,
    EncodeOptions,
    Encoder,
    encode_blocks,
    encode_blocks_in_pool,
)
from megatron_cpt.data.tokenizers.fast import (
    FastTokenizerMismatchError,
    TokenizerPlan,
    build_tokenizer,
    revoke_certificate,
)
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import RefusedError, UserError

Progress = Callable[[int, int, int, int], None]

SAVE_SECONDS = 10.0  # of work that a kill may lose


@dataclass
class Counts:
    """What was written so far; saved with the state.

    Attributes:
        documents: of each key.
        tokens: of each key, ends of documents included.
        text_bytes: UTF-8 bytes of the documents' texts.
        empty_documents: texts that gave no token.
        bytes_done: of the input files, on disk.
    """

    documents: list[int]
    tokens: list[int]
    text_bytes: int = 0
    empty_documents: int = 0
    bytes_done: int = 0


@dataclass(frozen=True)
class Job:
    """Everything that the call asked for, looked up."""

    files: InputFiles
    prefix: str
    layout: OutputLayout
    tokenizer: Tokenizer
    encode: EncodeOptions
    shard: Shard | None
    seed: int | None
    max_bad: bad.MaxBad
    workers: int
    progress: Progress | None
    notify: Callable[[str], None]

    def settings(self) -> dict[str, object]:
        """All that decides which bytes are written; the library in use does not."""
        return {
            "inputs": self.files.identity(),
            "tokenizer": self.tokenizer.fingerprint,
            "eod": self.tokenizer.eod_id,
            "encode": asdict(self.encode),
            "shard": [self.shard.index, self.shard.count] if self.shard else None,
            "shuffle": self.seed,
            "prefixes": self.layout.prefixes,
            "dtype": self.layout.dtype.name,
            "num_buckets": self.layout.num_buckets,
            "split_tokens": self.layout.split_tokens,
        }


def encode_all(job: Job, plan: TokenizerPlan, folder: WorkFolder) -> None:
    """Encodes what the folder does not hold yet; where gigatoken is found wrong, everything by the library.

    Raises:
        UserError: no line has a text.
        RefusedError: too many bad lines.
    """
    if folder.state.get("fast") and plan.certificate is None:
        job.notify("begins anew: what was done before used gigatoken, which is no longer trusted with this tokenizer")
        folder.start_from_scratch()
    try:
        try:
            _Run(job, plan, folder, mismatch=folder.state.get("mismatch")).encode()
        except FastTokenizerMismatchError as error:
            assert plan.certificate is not None
            job.notify(f"{error}; everything is encoded again by the library, and gigatoken not used any more")
            revoke_certificate(plan.spec, plan.certificate, str(error))
            folder.start_from_scratch()
            _Run(job, plan.without_fast(), folder, mismatch=str(error)).encode()
    except (RefusedError, UserError) as error:
        if isinstance(error, RefusedError) or not folder.state:  # a mistake met after hours costs no hours
            folder.remove()
        raise


class _Run:
    """What is counted and where it goes, from the state of the folder on."""

    def __init__(self, job: Job, plan: TokenizerPlan, folder: WorkFolder, mismatch: str | None) -> None:
        self._job, self._plan, self._folder, self._mismatch = job, plan, folder, mismatch
        state, num_keys = folder.state, len(job.layout.prefixes)
        self._counts = Counts(**state["counts"]) if state else Counts([0] * num_keys, [0] * num_keys)
        self._log = bad.BadLineLog(**state["bad"]) if state else bad.BadLineLog()
        self._cursor = Cursor(**state["cursor"]) if state else Cursor()
        self._sinks = [_sink(job, folder, number) for number in range(num_keys)]

    def encode(self) -> None:
        """Encodes the rest of the input."""
        saved = time.monotonic()
        with contextlib.closing(self._results()) as results:
            for result in results:
                self._take(result)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._flush()
                    self._folder.save_in_background(self._state(done=False))
                    saved = time.monotonic()
        if self._job.shard is None:
            self._check_the_whole()
        self._flush()
        self._folder.save(self._state(done=True))

    def _results(self) -> Generator[EncodedBlock, None, None]:
        job = self._job
        blocks = read_blocks(job.files, job.encode.blocks, job.shard, self._cursor)
        if job.workers > 1:
            return encode_blocks_in_pool(blocks, job.workers, self._plan, job.encode)
        return encode_blocks(blocks, Encoder(build_tokenizer(self._plan), job.encode))

    def _take(self, result: EncodedBlock) -> None:
        job, counts = self._job, self._counts
        for number, (sink, texts) in enumerate(zip(self._sinks, result.texts, strict=True)):
            sink.add(result.block, texts)
            counts.documents[number] += int(texts.lengths.size)
            counts.tokens[number] += int(texts.tokens.size)
            counts.text_bytes += texts.text_bytes
            counts.empty_documents += texts.num_empty
        counts.bytes_done = result.block.bytes_done
        self._log.add(result, self._folder, job.encode.blocks)
        job.max_bad.check(self._log.count, None, self._log.summary())
        self._cursor = result.block.next_cursor
        if job.progress is not None:
            first, last = (job.shard or Shard()).interval(job.files.total_bytes)
            done = min(result.block.bytes_done, last) - first
            job.progress(done, last - first, sum(counts.documents), sum(counts.tokens))

    def _check_the_whole(self) -> None:
        counts, log = self._counts, self._log
        if sum(counts.documents) == 0:
            paths = _some(self._job.files.paths)
            raise UserError(f"no document in {paths}: {counts.empty_documents} empty, {log.summary()}")
        self._job.max_bad.check(log.count, log.num_lines, log.summary())

    def _flush(self) -> None:
        for sink in self._sinks:
            sink.flush()

    def _state(self, done: bool) -> dict[str, object]:
        progress = {"cursor": asdict(self._cursor), "counts": asdict(self._counts), "bad": self._log.to_dict()}
        engine = {"fast": self._plan.certificate is not None, "engine": self._plan.engine}
        return progress | engine | {"mismatch": self._mismatch, "done": done}


def _sink(job: Job, folder: WorkFolder, number: int) -> Sink:
    if job.layout.num_buckets is None:
        return OrderedSink(folder, number)
    assert job.seed is not None
    return ShuffledSink(folder, number, job.seed, job.layout.num_buckets)


def _some(paths: Sequence[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
