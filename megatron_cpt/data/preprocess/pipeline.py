"""Encode text files to `.bin`/`.idx` pairs, on one machine or many; an interrupted run resumes.

The input is cut into blocks (`inputs.py`). Workers (`workers.py`) read, parse and encode one block at a time and
return flat arrays in shared memory. This process (`preprocess_run.py`) appends the arrays, in order, to files in a work
folder (`work_folder.py`) and publishes them at the end (`assemble.py`). Only a few blocks are in flight at a time, so a
terabyte takes no more memory than a gigabyte.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout, make_pairs
from megatron_cpt.data.preprocess.buckets import count_buckets
from megatron_cpt.data.preprocess.inputs import BlockOptions, InputFiles, Shard, expand_inputs, spool_stdin
from megatron_cpt.data.preprocess.preprocess_run import Job, PreprocessOptions, encode_all
from megatron_cpt.data.preprocess.work_folder import STATE_FILE, WorkFolder
from megatron_cpt.data.preprocess.workers import EncodeOptions
from megatron_cpt.data.tokenfile.header import best_dtype
from megatron_cpt.data.tokenfile.sidecar import Origin, is_free, own_versions, sidecar_path
from megatron_cpt.data.tokenfile.writer import require_file_name
from megatron_cpt.data.tokenizers.fast import plan_tokenizer
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import publish
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.files.whole_io import exists

__all__ = ["PreprocessOptions", "PreprocessReport", "preprocess"]

_UNPACKED_PER_PACKED = 4  # approximate bytes of text per byte of a packed file
_PLAIN = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".arrow")
_BLOCKS_PER_WORKER = 4  # fewer blocks than this do not pay for the start of one more worker


@dataclass(frozen=True)
class PreprocessReport:
    """Result of `preprocess` or `join_shards`.

    Attributes:
        prefixes: prefixes of all published datasets; empty for a shard.
        tokens: tokens written, end-of-document ids included.
        text_bytes: UTF-8 bytes of the documents' texts.
        input_bytes: size of the input files on disk.
        empty_documents: texts without a token.
        lines: lines and rows read, bad ones included.
        bad_lines: lines and rows skipped because they hold no text under the key.
        bad_bytes: share of all bytes that the bad lines hold.
        bad_reasons: number of bad lines per kind of reason.
        damaged: sentence per input file that could not be read to its end.
        added_ids: sentence about the ids that each document begins and ends with; empty without such ids.
        bad_path: file that lists each bad line with its file, number and reason; None if there are no bad lines.
        engine: library that encoded most documents.
        mismatch: text on which gigatoken and the tokenizer's own library disagreed, so that the library encoded
            everything again; None if they always agreed.
        seconds: wall-clock time of this call.
    """

    output_prefix: str
    prefixes: list[str]
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    input_bytes: int
    empty_documents: int
    lines: int
    bad_lines: int
    bad_bytes: float
    bad_reasons: dict[str, int]
    damaged: list[str]
    added_ids: str
    bad_path: str | None
    engine: str
    mismatch: str | None
    seconds: float


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    *,
    tokenizer: str,
    options: PreprocessOptions = PreprocessOptions(),  # noqa: B008 - immutable
) -> PreprocessReport:
    """Encode the texts of files into a dataset; without `options.shuffle`, documents keep their order.

    Nothing appears under the final names until everything is written. Call it again with the same arguments to resume
    an interrupted call; the resulting files are identical byte for byte.

        report = preprocess(["web/*.jsonl.zst"], "data/web", tokenizer="huggingface:tokenizer/",
                            options=PreprocessOptions(append_eod=True, workers=16))

    Args:
        inputs: files, globs and folders in the formats of `file_format.py`; "-" is standard input.
        output_prefix: the dataset is OUTPUT_PREFIX.bin and .idx, with a sidecar OUTPUT_PREFIX.json; bad lines are
            listed in OUTPUT_PREFIX.bad.jsonl.
        tokenizer: `KIND:PATH`, see `load_tokenizer`.
        options: everything else.

    Raises:
        UserError: a file is missing, the output exists, the tokenizer has no end of document, or no line has a text.
        RefusedError: more bad lines than `options.max_bad`, or a damaged file without `options.allow_damaged_input`.
    """
    started, prefix = time.monotonic(), os.fspath(output_prefix)
    for name in options.prefixes or [prefix]:
        require_file_name(name)
    path = Path(work_folder_path(prefix, options.shard))
    with os_errors_as_cpt_errors(path), spool_stdin(inputs, prefix) as (found, is_spooled):
        if is_spooled and options.shard is not None:
            raise UserError("input -: each shard would read another standard input; write it to a file first")
        if is_spooled:  # the input of an interrupted run is gone
            options = replace(options, restart=True)
        return _preprocess(found, prefix, tokenizer, options, started)


def _preprocess(
    inputs: Sequence[str | os.PathLike[str]], prefix: str, tokenizer: str, options: PreprocessOptions, started: float
) -> PreprocessReport:
    files = InputFiles.of(expand_inputs(inputs, options.notify))
    text_bytes = _estimate_text_bytes(files)
    job = _make_job(files, prefix, tokenizer, options, text_bytes)
    path, restart = work_folder_path(job.prefix, options.shard), options.restart
    # A run that was killed between its renames has published a part of its own output already.
    if restart or not exists(os.path.join(path, STATE_FILE)):
        ending = "" if options.split_tokens is None else "-00000"
        refuse_to_overwrite([prefix + ending for prefix in job.layout.prefixes], options.overwrite)
    for target in job.layout.prefixes:
        if not is_free(target):
            options.notify(f"{sidecar_path(target)} is not of a dataset and stays; {target} gets no sidecar")
    plan = plan_tokenizer(
        tokenizer,
        job.tokenizer,
        when=options.fast_tokenizer,
        check=options.tokenizer_check,
        input_bytes=text_bytes,
        notify=options.notify,
    )
    with WorkFolder(path, job.settings(), should_restart=restart) as folder:
        if not folder.state.get("done"):
            encode_all(job, plan, folder)
        if options.shard is not None:
            return _report(folder.state, job.layout, job.prefix, files.total_bytes, started)
        return publish_run(folder, [str(folder.path)], job.layout, job.prefix, files.total_bytes, started)


def publish_run(
    folder: WorkFolder, sources: Sequence[str], layout: OutputLayout, prefix: str, input_bytes: int, started: float
) -> PreprocessReport:
    """Make the pairs of a finished run, publish them, and remove the work folders.

    A call after a kill does what the killed call has left.

    Args:
        folder: the run's own folder; its state counts everything that is published.
        sources: folders that hold the tokens: `folder` itself, or the folders of the shards.
        input_bytes: size of the input files, for the report.
        started: `time.monotonic` at the start of the call, for the report.
    """
    if "renames" not in folder.state:
        origin = folder.state.get("origin")  # shards of earlier versions have none
        renames, prefixes = make_pairs(layout, origin and Origin(**origin), sources, str(folder.path))
        folder.save(folder.state | {"renames": renames, "prefixes": prefixes})
    publish([(source, target) for source, target in folder.state["renames"]])
    bad_path = f"{prefix}.bad.jsonl"
    if exists(folder.file(bad.FILE)):
        publish([(folder.file(bad.FILE), bad_path)])
    elif not folder.state["bad"]["count"]:
        Path(bad_path).unlink(missing_ok=True)  # belongs to the dataset that was replaced
    report = _report(folder.state, layout, prefix, input_bytes, started)
    for path in (*sources, str(folder.path)):
        shutil.rmtree(path, ignore_errors=True)
    return report


def work_folder_path(prefix: str, shard: Shard | None = None) -> str:
    """Return the work folder of a run."""
    return f"{prefix}.preprocess" + (f"-{shard.index}-of-{shard.count}" if shard else "")


def refuse_to_overwrite(prefixes: Sequence[str], overwrite: bool) -> None:
    """Raise a UserError if one of the datasets exists, unless `overwrite`."""
    found = [f"{prefix}.{end}" for prefix in prefixes for end in ("bin", "idx") if exists(f"{prefix}.{end}")]
    if found and not overwrite:
        raise UserError(f"{' and '.join(found)}: already exists; choose another output prefix, or allow overwriting")


def _make_job(files: InputFiles, prefix: str, spec: str, options: PreprocessOptions, text_bytes: int) -> Job:
    keys = (options.key,) if isinstance(options.key, str) else tuple(options.key)
    if len(set(keys)) < len(keys) or not keys:
        raise UserError(f"key: {', '.join(keys) or 'none'}; give each key once, and at least one key")
    tokenizer = load_tokenizer(spec)
    before, after = _find_added_ids(spec, tokenizer, options)
    first, last = tokenizer.template if options.add_template else ((), ())
    workers = options.workers
    if workers is None:
        most = text_bytes // (_BLOCKS_PER_WORKER * options.block_bytes)
        workers = max(1, min(len(os.sched_getaffinity(0)), most))
    blocks = BlockOptions(keys, options.block_bytes, options.max_line_bytes)
    return Job(
        files=files,
        prefix=prefix,
        layout=OutputLayout(
            prefixes=list(options.prefixes or ([prefix] if len(keys) == 1 else [f"{prefix}_{key}" for key in keys])),
            dtype=best_dtype(tokenizer.vocab_size),
            num_buckets=None if options.shuffle is None else count_buckets(text_bytes),
            split_tokens=options.split_tokens,
        ),
        tokenizer=tokenizer,
        encode=EncodeOptions(blocks, before, after, (tuple(first), tuple(last)), options.keep_empty),
        workers=workers,
        max_bad=bad.parse_max_bad(options.max_bad),
        added_ids=_describe(tokenizer, (*before, *first), (*last, *after)),
        origin=_find_origin(spec, tokenizer, files, options, (*before, *first), (*last, *after)),
        options=options,
    )


def _find_origin(
    spec: str,
    tokenizer: Tokenizer,
    files: InputFiles,
    options: PreprocessOptions,
    before: Sequence[int],
    after: Sequence[int],
) -> Origin:
    """Return the facts for the sidecars: only those that are equal on all shards."""
    library = getattr(tokenizer, "library", None)
    return Origin(
        tokenizer=spec,
        fingerprint=tokenizer.fingerprint,
        eod_id=after[-1] if after else None,
        made_by={
            "command": "preprocess",
            "input_files": len(files.paths),
            "input_bytes": files.total_bytes,
            "key": options.key if isinstance(options.key, str) else list(options.key),
            "begins_with": list(before),
            "ends_with": list(after),
            "shuffle": options.shuffle,
            "split_tokens": options.split_tokens,
        },
        versions=own_versions(*([library] if library else [])),
    )


def _find_added_ids(
    spec: str, tokenizer: Tokenizer, options: PreprocessOptions
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that each document begins and ends with.

    Raises:
        UserError: the tokenizer has no such id.
    """
    before: tuple[int, ...] = ()
    if options.prepend_bos:
        if tokenizer.bos_id is None:
            raise UserError(f"tokenizer {spec}: names no bos_token; do not ask for --prepend-bos")
        before = (tokenizer.bos_id,)
    elif any(tokenizer.template) and not options.add_template:
        first, last = tokenizer.template
        options.notify(
            f"the tokenizer's template puts ids {first} before and {last} after a text; they are not written "
            "(--prepend-bos writes the beginning of a sequence)"
        )
    if options.eod is not None:
        return before, (_find_eod(spec, tokenizer, str(options.eod)),)
    if not options.append_eod:
        return before, ()
    if tokenizer.eod_id is None:
        raise UserError(f"tokenizer {spec}: has no end-of-document id to append; name one: --eod TOKEN_OR_ID")
    if tokenizer.eod_note:
        options.notify(f"{tokenizer.eod_note}; another one: --eod TOKEN_OR_ID")
    return before, (tokenizer.eod_id,)


def _find_eod(spec: str, tokenizer: Tokenizer, eod: str) -> int:
    number = int(eod) if eod.isdecimal() else tokenizer.token_id(eod)
    if number is None or number >= tokenizer.vocab_size:
        raise UserError(
            f"eod {eod!r}: not in the vocabulary of tokenizer {spec}; give one of its tokens, or an id below "
            f"{tokenizer.vocab_size}"
        )
    return number


def _describe(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> str:
    """Return a sentence about the ids around each document; empty without such ids."""
    parts = []
    for verb, ids in (("begins", before), ("ends", after)):
        names = [f"{number} ({tokenizer.token_name(number)!r})" for number in ids]
        names = [name.removesuffix(" (None)") for name in names]
        if ids:
            parts.append(f"{verb} with id {', '.join(names)}")
    return f"each document {' and '.join(parts)}" if parts else ""


def _estimate_text_bytes(files: InputFiles) -> int:
    """Return roughly how much text the files hold; the same on every machine, as it decides the number of buckets."""
    return sum(
        (end - start) * (1 if path.lower().endswith(_PLAIN) else _UNPACKED_PER_PACKED)
        for path, (start, end) in zip(files.paths, pairwise(files.starts), strict=True)
    )


def _report(
    state: dict[str, Any], layout: OutputLayout, prefix: str, input_bytes: int, started: float
) -> PreprocessReport:
    counts, log = state["counts"], bad.BadLineLog(**state["bad"])
    return PreprocessReport(
        output_prefix=prefix,
        prefixes=state.get("prefixes", []),
        dtype=layout.dtype.name,
        documents=sum(counts["documents"]),
        tokens=sum(counts["tokens"]),
        text_bytes=counts["text_bytes"],
        input_bytes=input_bytes,
        empty_documents=counts["empty_documents"],
        lines=log.num_lines,
        bad_lines=log.count,
        bad_bytes=log.bad_bytes / max(1, log.num_bytes),
        bad_reasons=log.reasons,
        damaged=log.damaged,
        added_ids=state.get("added_ids", ""),  # shards of earlier versions have none
        bad_path=f"{prefix}.bad.jsonl" if log.count and "prefixes" in state else None,
        engine=state["engine"],
        mismatch=state["mismatch"],
        seconds=time.monotonic() - started,
    )
