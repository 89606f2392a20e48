"""Text files to `.bin`/`.idx`, as fast as the tokenizer allows, on one machine or many, however often it is stopped.

The input is cut into blocks (`blocks.py`). Workers (`encode.py`) read, parse and encode a block each and send back flat
arrays; this process appends them, in order, to files in a work folder (`work_folder.py`) and publishes these at the end
(`publish.py`). Only a few blocks are under way at a time, so memory stays the same for a gigabyte and for a terabyte.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megatron_cpt.data import bad_lines as bad
from megatron_cpt.data.blocks import BlockOptions, Cursor, read_blocks
from megatron_cpt.data.encode import EncodedBlock, EncodeOptions, Encoder, encode_blocks, encode_blocks_in_pool
from megatron_cpt.data.fast_tokenizer import (
    Check,
    FastTokenizerMismatchError,
    TokenizerPlan,
    WhenFast,
    build_tokenizer,
    plan_tokenizer,
    revoke_certificate,
)
from megatron_cpt.data.index_header import best_dtype
from megatron_cpt.data.inputs import InputFiles, Shard, expand_inputs
from megatron_cpt.data.publish import Layout
from megatron_cpt.data.report import PreprocessReport, publish_run, sum_up
from megatron_cpt.data.sinks import OrderedSink, ShuffledSink, Sink, count_buckets
from megatron_cpt.data.tokenizers import Tokenizer, load_tokenizer
from megatron_cpt.data.work_folder import WorkFolder
from megatron_cpt.errors import RefusedError, UserError

__all__ = ["PreprocessReport", "preprocess", "work_folder_path"]

Progress = Callable[[int, int, int, int], None]

SAVE_SECONDS = 10.0  # of work that a kill may lose
_PACKED_GROWTH = 4  # bytes of text in a byte of a packed file, about


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
class _Job:
    """Everything that the call asked for, looked up."""

    files: InputFiles
    prefix: str
    layout: Layout
    tokenizer: Tokenizer
    encode: EncodeOptions
    shard: Shard | None
    seed: int | None
    max_bad: bad.MaxBad
    workers: int
    progress: Progress | None
    notify: Callable[[str], None]
    started: float

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


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer_spec: str,
    *,
    key: str | Sequence[str] = "text",
    append_eod: bool = False,
    workers: int | None = 1,
    progress: Progress | None = None,
    max_bad: int | str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    shuffle: int | None = None,
    shard: Shard | None = None,
    split_tokens: int | None = None,
    fast: WhenFast = "auto",
    check: Check = "sample",
    prefixes: Sequence[str] | None = None,
    keep_empty: bool = False,
    blocks: BlockOptions | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> PreprocessReport:
    """Encodes the texts of files into a data set; unless shuffled, documents keep their order.

    Nothing appears under the final names until all of it is written. A call that was stopped at any moment, by whatever
    means, goes on when it is made again, and the result is the same to the byte.

    Args:
        inputs: files, globs and folders of `.jsonl` or `.json` (one JSON object a line; also with `.gz` or `.zst`) and
            `.parquet`.
        output_prefix: the data set is OUTPUT_PREFIX.bin and .idx; bad lines are listed in OUTPUT_PREFIX.bad.jsonl.
        tokenizer_spec: `KIND:PATH`, see `load_tokenizer`.
        key: the text's key in each object, or column. Several give a data set each, OUTPUT_PREFIX_KEY.
        append_eod: end each document with the tokenizer's end-of-document id.
        workers: processes that encode. With 1 this process does it itself; with more, a script that calls this needs
            the `if __name__ == "__main__"` guard. None: one a core, fewer for little input.
        progress: called after each block with (input bytes done, input bytes in all, documents, tokens).
        max_bad: give up when there are more bad lines than this, a number or a part as in "0.1%"; None: however many.
        overwrite: replace a data set that is already there.
        restart: begin anew where a call was stopped before.
        shuffle: seed of a random order of the documents; None: their own.
        shard: encode only a part, to be joined with the others by `join.join_shards`.
        split_tokens: write pairs of at most so many tokens, OUTPUT_PREFIX-00000 and so on; None: one pair.
        fast: whether to use gigatoken, see `plan_tokenizer`.
        check: how much of its work to compare.
        prefixes: where the data set of each key goes, if not to the usual names.
        keep_empty: keep a text without tokens as a document without sequences, as Megatron-LM's tool does.
        blocks: other sizes of blocks and longest lines; its keys do not count.
        notify: told in a sentence what takes long and what was decided.

    Raises:
        UserError: a file is missing, the output exists, the tokenizer has no end of document, or no line has a text.
        RefusedError: more bad lines than `max_bad`.
    """
    started = time.monotonic()
    files = InputFiles.of(expand_inputs(inputs))
    keys = (key,) if isinstance(key, str) else tuple(key)
    prefix = os.fspath(output_prefix)
    if prefixes is None:
        prefixes = [prefix] if len(keys) == 1 else [f"{prefix}_{name}" for name in keys]
    if len(set(keys)) < len(keys) or not keys:
        raise UserError(f"key: {', '.join(keys) or 'none'}; give each key once, at least one")
    tokenizer = load_tokenizer(tokenizer_spec)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {tokenizer_spec}: has no end-of-document id to append; leave append_eod out")
    text_bytes = _text_bytes(files)
    cut = BlockOptions(keys, blocks.block_bytes, blocks.max_line_bytes) if blocks else BlockOptions(keys)
    num_buckets = None if shuffle is None else count_buckets(text_bytes)
    job = _Job(
        files=files,
        prefix=prefix,
        layout=Layout(list(prefixes), best_dtype(tokenizer.vocab_size), num_buckets, split_tokens),
        tokenizer=tokenizer,
        encode=EncodeOptions(cut, append_eod, keep_empty),
        shard=shard,
        seed=shuffle,
        max_bad=bad.parse_max_bad(max_bad),
        workers=_count_workers(text_bytes, cut) if workers is None else workers,
        progress=progress,
        notify=notify,
        started=started,
    )
    folder = _work_folder(job, overwrite, restart)
    plan = plan_tokenizer(tokenizer_spec, tokenizer, when=fast, check=check, input_bytes=text_bytes, notify=notify)
    with folder:
        if not folder.state.get("done"):
            _encode_with_fallback(job, plan, folder)
        if shard is not None:
            return sum_up(folder.state, job.layout, prefix, files.total_bytes, job.started)
        return publish_run(folder, [folder.path], job.layout, prefix, files.total_bytes, job.started)


def work_folder_path(prefix: str, shard: Shard | None = None) -> str:
    """Where a run keeps what it has done so far."""
    return f"{prefix}.preprocess" + (f"-{shard.index}-of-{shard.count}" if shard else "")


def refuse_to_overwrite(prefixes: Sequence[str], overwrite: bool) -> None:
    """Raises a UserError where one of the data sets is there, unless that is wanted."""
    there = [f"{prefix}.{end}" for prefix in prefixes for end in ("bin", "idx") if os.path.exists(f"{prefix}.{end}")]
    if there and not overwrite:
        raise UserError(f"{' and '.join(there)}: already there; choose another output prefix, or allow overwriting")


def _work_folder(job: _Job, overwrite: bool, restart: bool) -> WorkFolder:
    path = work_folder_path(job.prefix, job.shard)
    # A run that was killed between its renames has a part of its output in place already.
    if restart or not os.path.exists(os.path.join(path, "state.json")):
        split = job.layout.split_tokens is not None
        refuse_to_overwrite([f"{p}-00000" if split else p for p in job.layout.prefixes], overwrite)
    return WorkFolder(path, job.settings(), restart=restart)


def _encode_with_fallback(job: _Job, plan: TokenizerPlan, folder: WorkFolder) -> None:
    if folder.state.get("fast") and plan.certificate is None:
        job.notify("begins anew: what was done before used gigatoken, which is no longer trusted with this tokenizer")
        folder.clear()
        folder.begin()
    try:
        try:
            _encode(job, plan, folder, mismatch=folder.state.get("mismatch"))
        except FastTokenizerMismatchError as error:
            assert plan.certificate is not None
            job.notify(f"{error}; everything is encoded again by the library, and gigatoken not used any more")
            revoke_certificate(plan.spec, plan.certificate, str(error))
            folder.clear()
            folder.begin()
            _encode(job, plan.without_fast(), folder, mismatch=str(error))
    except (RefusedError, UserError) as error:
        if isinstance(error, RefusedError) or not folder.state:  # a mistake met after hours costs no hours
            folder.remove()
        raise


def _encode(job: _Job, plan: TokenizerPlan, folder: WorkFolder, mismatch: str | None) -> None:
    state = folder.state
    num_keys = len(job.layout.prefixes)
    counts = Counts(**state["counts"]) if state else Counts([0] * num_keys, [0] * num_keys)
    log = bad.BadLineLog(**state["bad"]) if state else bad.BadLineLog()
    cursor = Cursor(**state["cursor"]) if state else Cursor()
    sinks = [_sink(job, folder, number) for number in range(num_keys)]

    def save(done: bool) -> None:
        for sink in sinks:
            sink.flush()
        now = {"cursor": asdict(cursor), "counts": asdict(counts), "bad": log.to_dict(), "done": done}
        folder.save(now | {"fast": plan.certificate is not None, "mismatch": mismatch, "engine": plan.engine})

    blocks = read_blocks(job.files, job.encode.blocks, job.shard, cursor)
    if job.workers > 1:
        results = encode_blocks_in_pool(blocks, job.workers, plan, job.encode)
    else:
        results = encode_blocks(blocks, Encoder(build_tokenizer(plan), job.encode))
    saved = time.monotonic()
    with contextlib.closing(results):
        for result in results:
            _take(result, sinks, counts)
            log.add(result, folder, job.encode.blocks)
            job.max_bad.check(log.count, None, log.summary())
            cursor = result.block.next_cursor
            if job.progress is not None:
                first, last = (job.shard or Shard()).interval(job.files.total_bytes)
                done = min(result.block.bytes_done, last) - first
                job.progress(done, last - first, sum(counts.documents), sum(counts.tokens))
            if time.monotonic() - saved > SAVE_SECONDS:
                save(done=False)
                saved = time.monotonic()
    if job.shard is None and sum(counts.documents) == 0:
        raise UserError(f"no document in {_some(job.files.paths)}: {counts.empty_documents} empty, {log.summary()}")
    if job.shard is None:
        job.max_bad.check(log.count, log.num_lines, log.summary())
    save(done=True)


def _take(result: EncodedBlock, sinks: Sequence[Sink], counts: Counts) -> None:
    for number, (sink, texts) in enumerate(zip(sinks, result.texts, strict=True)):
        sink.add(result.block, texts)
        counts.documents[number] += int(texts.lengths.size)
        counts.tokens[number] += int(texts.tokens.size)
        counts.text_bytes += texts.text_bytes
        counts.empty_documents += texts.num_empty
    counts.bytes_done = result.block.bytes_done


def _sink(job: _Job, folder: WorkFolder, number: int) -> Sink:
    if job.layout.num_buckets is None:
        return OrderedSink(folder, number)
    assert job.seed is not None
    return ShuffledSink(folder, number, job.seed, job.layout.num_buckets)


def _text_bytes(files: InputFiles) -> int:
    """About how much text the files hold; the same on every machine."""
    sizes = [after - before for before, after in zip(files.starts[:-1], files.starts[1:], strict=True)]
    plain = [path.endswith((".jsonl", ".json")) for path in files.paths]
    return sum(size * (1 if is_plain else _PACKED_GROWTH) for size, is_plain in zip(sizes, plain, strict=True))


def _count_workers(text_bytes: int, options: BlockOptions) -> int:
    """One a core that this process may use, but none that would only start and end."""
    return max(1, min(len(os.sched_getaffinity(0)), text_bytes // (4 * options.block_bytes)))


def _some(paths: Sequence[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
