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
from megatron_cpt.data.preprocess.work_folder import FinishedWork, WorkFolder, read_finished
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
        RefusedError: files of a shard are damaged, there are too many bad lines, or one shard found a mismatch of
            gigatoken and others used gigatoken.
    """
    prefix = os.fspath(output_prefix)
    require_file_name(prefix)
    with os_errors_as_cpt_errors(Path(work_folder_path(prefix))):
        return _join(prefix, count, bad.parse_max_bad(max_bad), overwrite)


def _join(prefix: str, count: int, limit: bad.MaxBad, overwrite: bool) -> PreprocessReport:
    started = time.monotonic()
    folders = [work_folder_path(prefix, Shard(index, count)) for index in range(count)]
    shards: list[FinishedWork] = []
    interrupted = _read_interrupted(prefix)  # a killed call had started to publish: only do the rest
    if interrupted is None:
        shards = _finished_shards(folders)
    settings = (interrupted or shards[0]).settings | {"shard": None}
    dtype = np.dtype(settings["dtype"]).newbyteorder("<")
    layout = OutputLayout(settings["prefixes"], dtype, settings["num_buckets"], settings["split_tokens"])
    if interrupted is None:
        refuse_to_overwrite(layout.prefixes, overwrite)
        state = _joined_state([shard.state for shard in shards])
        limit.check(bad.BadLineLog(**state["bad"]), is_complete=True)
    with WorkFolder(work_folder_path(prefix), settings) as folder:
        if interrupted is None:
            folder.start_from_scratch()
            for source in folders:
                _append_file(folder, os.path.join(source, bad.FILE))
            folder.save(state)
        input_bytes = sum(size for _, size, _ in settings["inputs"])
        inputs = [identity for shard in shards for identity in shard.identities]
        return publish_run(folder, folders, inputs, layout, prefix, input_bytes, started)


def _read_interrupted(prefix: str) -> FinishedWork | None:
    """Return the work folder of a join that was killed while it published; None if no such join can be continued."""
    try:
        found = read_finished(work_folder_path(prefix))
    except RefusedError:  # damaged: join the shards again
        return None
    return found if found is not None and found.is_assembled else None


def _finished_shards(folders: Sequence[str]) -> list[FinishedWork]:
    """Read all shards, which must have the same settings.

    Raises:
        UserError: a shard is missing or not finished, or was made with other settings.
        RefusedError: files of a shard are damaged, or some shards used gigatoken and another found it wrong.
    """
    found = [read_finished(folder) for folder in folders]
    missing = [folder for folder, shard in zip(folders, found, strict=True) if shard is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing or not finished; run these shards (again) first")
    shards = [shard for shard in found if shard is not None]
    first = shards[0].settings | {"shard": None}
    for folder, shard in zip(folders, shards, strict=True):
        names = differing_names(shard.settings | {"shard": None}, first)
        if names:
            raise UserError(f"{folder}: made with other settings than {folders[0]} ({', '.join(names)}); run it again")
    mismatched = [folder for folder, shard in zip(folders, shards, strict=True) if shard.state["mismatch"]]
    fast = [folder for folder, shard in zip(folders, shards, strict=True) if shard.state["fast"]]
    if mismatched and fast:
        raise RefusedError(
            f"{mismatched[0]}: found that gigatoken gives other ids with this tokenizer; run the shards that used it "
            f"again with --fast-tokenizer off --restart: {', '.join(fast)}"
        )
    return shards


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
