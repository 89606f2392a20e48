"""Text files to `.bin`/`.idx`, as fast as the tokenizer allows, on one machine or many, however often it is stopped.

The input is cut into blocks (`blocks.py`). Workers (`encode.py`) read, parse and encode a block each and leave flat
arrays in shared memory; this process (`preprocess_run.py`) appends them, in order, to files in a work folder
(`work_folder.py`) and publishes these at the end (`publish.py`). Only a few blocks are under way at a time, so memory
stays the same for a gigabyte and for a terabyte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_cpt.data.preprocess.assemble import OutputLayout
from megatron_cpt.data.preprocess.bad_lines import parse_max_bad
from megatron_cpt.data.preprocess.block import BlockOptions
from megatron_cpt.data.preprocess.buckets import count_buckets
from megatron_cpt.data.preprocess.inputs import InputFiles, Shard, expand_inputs
from megatron_cpt.data.preprocess.preprocess_run import Job, Progress, encode_all
from megatron_cpt.data.preprocess.report import PreprocessReport, publish_run, sum_up
from megatron_cpt.data.preprocess.work_folder import STATE_FILE, WorkFolder
from megatron_cpt.data.preprocess.workers import EncodeOptions
from megatron_cpt.data.tokenfile.header import best_dtype
from megatron_cpt.data.tokenizers.fast import Check, WhenFast, plan_tokenizer
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import UserError

__all__ = ["PreprocessReport", "preprocess", "work_folder_path"]

_PACKED_GROWTH = 4  # bytes of text in a byte of a packed file, about


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
    files, prefix = InputFiles.of(expand_inputs(inputs)), os.fspath(output_prefix)
    text_bytes, keys = _text_bytes(files), _distinct_keys(key)
    tokenizer = _load_tokenizer(tokenizer_spec, append_eod)
    cut = replace(blocks or BlockOptions(()), keys=keys)
    layout = OutputLayout(
        prefixes=list(prefixes or ([prefix] if len(keys) == 1 else [f"{prefix}_{name}" for name in keys])),
        dtype=best_dtype(tokenizer.vocab_size),
        num_buckets=None if shuffle is None else count_buckets(text_bytes),
        split_tokens=split_tokens,
    )
    job = Job(
        files=files,
        prefix=prefix,
        layout=layout,
        tokenizer=tokenizer,
        encode=EncodeOptions(cut, append_eod, keep_empty),
        shard=shard,
        seed=shuffle,
        max_bad=parse_max_bad(max_bad),
        workers=_count_workers(text_bytes, cut) if workers is None else workers,
        progress=progress,
        notify=notify,
    )
    folder = _work_folder(job, overwrite, restart)
    plan = plan_tokenizer(tokenizer_spec, tokenizer, when=fast, check=check, input_bytes=text_bytes, notify=notify)
    with folder:
        if not folder.state.get("done"):
            encode_all(job, plan, folder)
        if shard is not None:
            return sum_up(folder.state, layout, prefix, files.total_bytes, started)
        return publish_run(folder, [str(folder.path)], layout, prefix, files.total_bytes, started)


def work_folder_path(prefix: str, shard: Shard | None = None) -> str:
    """Where a run keeps what it has done so far."""
    return f"{prefix}.preprocess" + (f"-{shard.index}-of-{shard.count}" if shard else "")


def refuse_to_overwrite(prefixes: Sequence[str], overwrite: bool) -> None:
    """Raises a UserError where one of the data sets is there, unless that is wanted."""
    there = [f"{prefix}.{end}" for prefix in prefixes for end in ("bin", "idx") if os.path.exists(f"{prefix}.{end}")]
    if there and not overwrite:
        raise UserError(f"{' and '.join(there)}: already there; choose another output prefix, or allow overwriting")


def _work_folder(job: Job, overwrite: bool, restart: bool) -> WorkFolder:
    path = work_folder_path(job.prefix, job.shard)
    # A run that was killed between its renames has a part of its output in place already.
    if restart or not os.path.exists(os.path.join(path, STATE_FILE)):
        split = job.layout.split_tokens is not None
        refuse_to_overwrite([f"{p}-00000" if split else p for p in job.layout.prefixes], overwrite)
    return WorkFolder(path, job.settings(), should_restart=restart)


def _distinct_keys(key: str | Sequence[str]) -> tuple[str, ...]:
    keys = (key,) if isinstance(key, str) else tuple(key)
    if len(set(keys)) < len(keys) or not keys:
        raise UserError(f"key: {', '.join(keys) or 'none'}; give each key once, at least one")
    return keys


def _load_tokenizer(spec: str, append_eod: bool) -> Tokenizer:
    tokenizer = load_tokenizer(spec)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {spec}: has no end-of-document id to append; leave append_eod out")
    return tokenizer


def _text_bytes(files: InputFiles) -> int:
    """About how much text the files hold; the same on every machine."""
    sizes = [after - before for before, after in zip(files.starts[:-1], files.starts[1:], strict=True)]
    plain = [path.endswith((".jsonl", ".json")) for path in files.paths]
    return sum(size * (1 if is_plain else _PACKED_GROWTH) for size, is_plain in zip(sizes, plain, strict=True))


def _count_workers(text_bytes: int, options: BlockOptions) -> int:
    """One a core that this process may use, but none that would only start and end."""
    return max(1, min(len(os.sched_getaffinity(0)), text_bytes // (4 * options.block_bytes)))
