"""Join shards from several nodes into one dataset, identical byte for byte to the dataset of a single run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.pipeline import PreprocessReport, publish_run, refuse_to_overwrite, work_folder_path
from megatron_cpt.data.preprocess.work_folder import WorkFolder, read_finished
from megatron_cpt.data.tokenfile.writer import require_file_name
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.resumable import differing_names
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.files.whole_io import exists, open_reader

_COPY_BYTES = 1 << 24


def join_shards(
    output_prefix: str | os.PathLike[str], count: int, *, max_bad: int | str | None = None, overwrite: bool = False
) -> PreprocessReport:
    """Join all shards of a dataset, copying each token once; the shards' work folders are removed at the end.

    Args:
        output_prefix: the output prefix that the shards were given.
        count: number of shards.
        max_bad: see `PreprocessOptions`, as for `overwrite`.

    Raises:
        UserError: a shard is missing or not finished, shards were made with different settings, the output exists, or
            no shard holds a document.
        RefusedError: too many bad lines, or one shard found a mismatch of gigatoken and others used gigatoken.
    """
    prefix = os.fspath(output_prefix)
    require_file_name(prefix)
    with os_errors_as_cpt_errors(Path(work_folder_path(prefix))):
        return _join(prefix, count, bad.parse_max_bad(max_bad), overwrite)


def _join(prefix: str, count: int, limit: bad.MaxBad, overwrite: bool) -> PreprocessReport:
    started = time.monotonic()
    folders = [work_folder_path(prefix, Shard(index, count)) for index in range(count)]
    interrupted = read_finished(work_folder_path(prefix))  # a killed call had started to publish: only do the rest
    states: list[dict[str, Any]] = []
    if interrupted is not None:
        settings = interrupted[0]
    else:
        settings, states = _finished_shards(folders)
    dtype = np.dtype(settings["dtype"]).newbyteorder("<")
    layout = OutputLayout(settings["prefixes"], dtype, settings["num_buckets"], settings["split_tokens"])
    if interrupted is None:
        refuse_to_overwrite(layout.prefixes, overwrite)
        state = _joined_state(states)
        limit.check(bad.BadLineLog(**state["bad"]), is_complete=True)
    with WorkFolder(work_folder_path(prefix), settings) as folder:
        if interrupted is None:
            folder.start_from_scratch()
            for source in folders:
                _append_file(folder, os.path.join(source, bad.FILE))
            folder.save(state)
        input_bytes = sum(size for _, size, _ in settings["inputs"])
        return publish_run(folder, folders, layout, prefix, input_bytes, started)


def _finished_shards(folders: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that all shards share, and the state of each shard."""
    found = [read_finished(folder) for folder in folders]
    missing = [folder for folder, shard in zip(folders, found, strict=True) if shard is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing or not finished; run these shards (again) first")
    shards = [shard for shard in found if shard is not None]
    first = shards[0][0] | {"shard": None}
    for folder, (settings, _) in zip(folders, shards, strict=True):
        names = differing_names(settings | {"shard": None}, first)
        if names:
            raise UserError(f"{folder}: made with other settings than {folders[0]} ({', '.join(names)}); run it again")
    mismatched = [folder for folder, (_, state) in zip(folders, shards, strict=True) if state["mismatch"]]
    fast = [folder for folder, (_, state) in zip(folders, shards, strict=True) if state["fast"]]
    if mismatched and fast:
        raise RefusedError(
            f"{mismatched[0]}: found that gigatoken gives other ids with this tokenizer; run the shards that used it "
            f"again with --fast-tokenizer off --restart: {', '.join(fast)}"
        )
    return first, [state for _, state in shards]


def _joined_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = [state["counts"] for state in states]
    if not any(sum(count["documents"]) for count in counts):
        raise UserError("no document in any of the shards")
    totals: dict[str, Any] = {
        name: sum(count[name] for count in counts) for name in ("text_bytes", "empty_documents", "bytes_done")
    }
    for name in ("documents", "tokens"):
        totals[name] = [sum(per_key) for per_key in zip(*(count[name] for count in counts), strict=True)]
    log = bad.join_logs([bad.BadLineLog(**state["bad"]) for state in states])
    return states[0] | {"counts": totals, "bad": asdict(log), "done": True}


def _append_file(folder: WorkFolder, path: str) -> None:
    if not exists(path):
        return
    with open_reader(path) as file:
        while piece := file.read(_COPY_BYTES):
            folder.append(bad.FILE, piece)
