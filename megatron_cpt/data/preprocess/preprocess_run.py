"""Encode every block of a run's input and append the results to its work folder, saving progress regularly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout
from megatron_cpt.data.preprocess.buckets import OrderedSink, ShuffledSink
from megatron_cpt.data.preprocess.inputs import (
    BLOCK_BYTES,
    MAX_LINE_BYTES,
    Block,
    Cursor,
    InputFiles,
    Shard,
    read_blocks,
)
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import (
    EncodedBlock,
    EncodeOptions,
    Encoder,
    RayOptions,
    encode_blocks_in_pool,
    encode_blocks_on_ray,
)
from megatron_cpt.data.tokenfile.sidecar import Origin
from megatron_cpt.data.tokenizers.fast import (
    Check,
    FastTokenizerMismatchError,
    TokenizerPlan,
    WhenFast,
    build_tokenizer,
    revoke_certificate,
)
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import check_unchanged

Progress = Callable[[int, int, int, int], None]
Notify = Callable[[str], None]
Engine = Literal["local", "ray"]

SAVE_SECONDS = 10.0  # at most this much work is lost in a kill
_SHOWN_PATHS = 5


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Everything about a `preprocess` run that has a default.

    Attributes:
        key: the text's key in each JSON object, or its parquet column. Several keys give one dataset per key,
            OUTPUT_PREFIX_KEY.
        append_eod: end each document with the tokenizer's end-of-document id.
        eod: token or id that ends each document, in place of the tokenizer's; implies `append_eod`.
        prepend_bos: begin each document with the tokenizer's beginning-of-sequence id.
        add_template: put the ids of the tokenizer's own template around each text, empty texts included.
        keep_empty: keep a text without tokens as a document without sequences, as Megatron-LM's tool does.
        workers: processes that encode. 1: this process does it. More: a script that calls `preprocess` needs the
            `if __name__ == "__main__"` guard. None: one per core, fewer for little input.
        shuffle: seed of a random order of the documents; None keeps the order of the input.
        split_tokens: write pairs of at most this many tokens, OUTPUT_PREFIX-00000 and so on; None writes one pair.
        shard: encode only this part of the input; `join_shards` makes one dataset of all parts.
        max_bad: give up at more bad lines than this, a number (100) or a share of all lines and bytes ("0.1%"). None:
            0.1 %, but 10 lines and a megabyte are always accepted.
        allow_damaged_input: keep the documents before the damage of a truncated or corrupt file; otherwise such a file
            is refused.
        max_line_bytes: a longer line counts as bad and is never held in memory.
        block_bytes: approximate size of a block, the unit of work, of resuming and of sharding.
        fast_tokenizer: when to use gigatoken, see `plan_tokenizer`.
        tokenizer_check: how much of gigatoken's output is compared with the tokenizer's own library.
        prefixes: output prefix per key, instead of the names derived from OUTPUT_PREFIX.
        engine: "ray" encodes on a Ray cluster with `workers` CPUs, "local" in processes of this machine; the bytes
            that are written and the saved progress are equal.
        ray_address: address of a running cluster; None: one is started on this machine.
        overwrite: replace a dataset that already exists.
        restart: discard the progress of an interrupted run and start from scratch.
        progress: called after each block with (input bytes done, input bytes in total, documents, tokens).
        notify: called with a sentence about each decision and each step that takes long.
    """

    key: str | Sequence[str] = "text"
    append_eod: bool = False
    eod: str | int | None = None
    prepend_bos: bool = False
    add_template: bool = False
    keep_empty: bool = False
    workers: int | None = 1
    shuffle: int | None = None
    split_tokens: int | None = None
    shard: Shard | None = None
    max_bad: int | str | None = None
    allow_damaged_input: bool = False
    max_line_bytes: int = MAX_LINE_BYTES
    block_bytes: int = BLOCK_BYTES
    fast_tokenizer: WhenFast = "auto"
    tokenizer_check: Check = "sample"
    prefixes: Sequence[str] | None = None
    engine: Engine = "local"
    ray_address: str | None = None
    overwrite: bool = False
    restart: bool = False
    progress: Progress | None = None
    notify: Notify = lambda text: None

    def __post_init__(self) -> None:
        at_least = {"workers": 1, "shuffle": 0, "split_tokens": 1, "max_line_bytes": 1, "block_bytes": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"{name}: {value!r}; give a whole number of at least {least}")
        known = {"fast_tokenizer": WhenFast, "tokenizer_check": Check, "engine": Engine}
        for name, choices in {name: get_args(kind) for name, kind in known.items()}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r}; give one of {', '.join(choices)}")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError(
                f"ray_address: {self.ray_address}: is used by --engine ray alone; add it, or remove the address"
            )


class DamagedInputError(RefusedError):
    """Input file that is truncated or corrupt."""


@dataclass
class Counts:
    """Totals of everything written so far, documents and tokens per key; see `PreprocessReport`. Saved with the state.

    Attributes:
        bytes_done: bytes of the input files on disk.
    """

    documents: list[int]
    tokens: list[int]
    text_bytes: int = 0
    empty_documents: int = 0
    bytes_done: int = 0


@dataclass(frozen=True)
class Job:
    """A call of `preprocess` with every option resolved; `options` are the options as they were given.

    Attributes:
        added_ids: sentence about the ids that each document begins and ends with.
        origin: facts for the sidecars of the datasets.
    """

    files: InputFiles
    prefix: str
    layout: OutputLayout
    tokenizer: Tokenizer
    encode: EncodeOptions
    workers: int
    max_bad: bad.MaxBad
    added_ids: str
    origin: Origin
    options: PreprocessOptions

    def settings(self) -> dict[str, object]:
        """Return everything that decides which bytes are written; the library that encodes does not."""
        shard = self.options.shard
        return {
            "inputs": self.files.settings(),
            "tokenizer": self.tokenizer.fingerprint,
            "encode": asdict(self.encode),
            "shard": [shard.index, shard.count] if shard else None,
            "shuffle": self.options.shuffle,
            "prefixes": self.layout.prefixes,
            "dtype": self.layout.dtype.name,
            "num_buckets": self.layout.num_buckets,
            "split_tokens": self.layout.split_tokens,
        }


def encode_all(job: Job, plan: TokenizerPlan, folder: WorkFolder) -> None:
    """Encode the rest of the input; after a mismatch of gigatoken, encode everything again with the library.

    Raises:
        UserError: no line has a text.
        RefusedError: too many bad lines.
    """
    if folder.state.get("fast") and plan.certificate is None:
        job.options.notify(
            "starting from scratch: the interrupted run used gigatoken, which is no longer trusted with this tokenizer"
        )
        folder.start_from_scratch()
    try:
        try:
            _Run(job, plan, folder, mismatch=folder.state.get("mismatch")).encode()
        except FastTokenizerMismatchError as error:
            assert plan.certificate is not None
            job.options.notify(f"{error}; everything is encoded again by the library, without gigatoken")
            revoke_certificate(plan.spec, plan.certificate, str(error))
            folder.start_from_scratch()
            _Run(job, replace(plan, certificate=None), folder, mismatch=str(error)).encode()
    except (RefusedError, UserError) as error:
        check_unchanged(job.files.identities)  # a file that was cut a moment ago looks damaged
        # A mistake or damage in a block in the middle keeps the saved progress.
        if not folder.state or (isinstance(error, RefusedError) and not isinstance(error, DamagedInputError)):
            folder.remove()
        raise


def _empty_archives(job: Job) -> list[str]:
    """Return a sentence about each archive of 0 bytes, unless another shard does it.

    Raises:
        DamagedInputError: there is one, and it is not allowed.
    """
    if (job.options.shard or Shard()).index != 0:
        return []
    problems = [f"{path}: truncated or corrupt after 0 bytes: it is empty" for path in job.files.empty_archives()]
    if problems and not job.options.allow_damaged_input:
        raise DamagedInputError(f"input {problems[0]}; replace the file, or skip it with --allow-damaged-input")
    for problem in problems:
        job.options.notify(f"damaged input {problem}")
    return problems


class _Run:
    """Loop over the blocks that the folder's state does not count yet."""

    def __init__(self, job: Job, plan: TokenizerPlan, folder: WorkFolder, mismatch: str | None) -> None:
        self._job, self._plan, self._folder, self._mismatch = job, plan, folder, mismatch
        state, num_keys = folder.state, len(job.layout.prefixes)
        self._counts = Counts(**state["counts"]) if state else Counts([0] * num_keys, [0] * num_keys)
        self._log = bad.BadLineLog(**state["bad"]) if state else bad.BadLineLog(damaged=_empty_archives(job))
        self._cursor = Cursor(**state["cursor"]) if state else Cursor()
        seed, num_buckets = job.options.shuffle, job.layout.num_buckets
        self._sinks: list[OrderedSink | ShuffledSink] = [
            OrderedSink(folder, number)
            if num_buckets is None or seed is None
            else ShuffledSink(folder, number, seed, num_buckets)
            for number in range(num_keys)
        ]

    def encode(self) -> None:
        last_save = time.monotonic()
        with contextlib.closing(self._results()) as results:
            for result in results:
                self._write(result)
                if time.monotonic() - last_save > SAVE_SECONDS:
                    self._flush()
                    self._folder.save_in_background(self._state(done=False))
                    last_save = time.monotonic()
        check_unchanged(self._job.files.identities)  # workers may read a block after `read_blocks` has cut its file
        if self._job.options.shard is None:
            self._check_totals()
        self._flush()
        self._folder.save(self._state(done=True))

    def _results(self) -> Generator[EncodedBlock, None, None]:
        job = self._job
        blocks = read_blocks(job.files, job.encode.blocks, job.options.shard, self._cursor)
        if job.options.engine == "ray":
            engine = RayOptions(job.options.ray_address, job.options.workers)
            return encode_blocks_on_ray(blocks, engine, self._plan, job.encode, job.origin.versions)
        if job.workers > 1:
            return encode_blocks_in_pool(blocks, job.workers, self._plan, job.encode)
        encoder = Encoder(build_tokenizer(self._plan), job.encode)
        return (encoder(block) for block in blocks)

    def _write(self, result: EncodedBlock) -> None:
        job, counts, block = self._job, self._counts, result.block
        if block.damage is not None and not job.options.allow_damaged_input:
            self._log.add(result, self._folder, job.encode.blocks)
            raise DamagedInputError(
                f"input {self._add_damage(block)}; replace the file, or keep what can be read of it with "
                "--allow-damaged-input"
            )
        for number, (sink, texts) in enumerate(zip(self._sinks, result.texts, strict=True)):
            sink.add(result.block, texts)
            counts.documents[number] += int(texts.lengths.size)
            counts.tokens[number] += int(texts.tokens.size)
            counts.text_bytes += texts.text_bytes
            counts.empty_documents += texts.num_empty
        counts.bytes_done = result.block.bytes_done
        self._log.add(result, self._folder, job.encode.blocks)
        if block.damage is not None:
            job.options.notify(f"damaged input {self._add_damage(block)}")
        job.max_bad.check(self._log, is_complete=False)
        self._cursor = block.next_cursor
        if job.options.progress is not None:
            first, last = (job.options.shard or Shard()).interval(job.files.total_bytes)
            done = min(block.bytes_done, last) - first
            job.options.progress(done, last - first, sum(counts.documents), sum(counts.tokens))

    def _add_damage(self, block: Block) -> str:
        return self._log.add_damage(block, block.bytes_done - self._job.files.starts[block.file])

    def _check_totals(self) -> None:
        """Refuse what only the end of the input shows; for shards, `join_shards` does it."""
        counts, log, paths = self._counts, self._log, self._job.files.paths
        if sum(counts.documents) == 0:
            names = ", ".join(paths[:_SHOWN_PATHS])
            more = f" and {len(paths) - _SHOWN_PATHS} more" if len(paths) > _SHOWN_PATHS else ""
            raise UserError(f"no document in {names}{more}: {counts.empty_documents} empty, {log.summary()}")
        self._job.max_bad.check(log, is_complete=True)

    def _flush(self) -> None:
        for sink in self._sinks:
            sink.flush()

    def _state(self, done: bool) -> dict[str, object]:
        return {
            "cursor": asdict(self._cursor),
            "counts": asdict(self._counts),
            "bad": asdict(self._log),
            "fast": self._plan.certificate is not None,
            "engine": self._plan.engine,
            "mismatch": self._mismatch,
            "added_ids": self._job.added_ids,
            "origin": asdict(self._job.origin),
            "done": done,
        }
