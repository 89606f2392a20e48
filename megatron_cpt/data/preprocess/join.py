"""Shards that nodes encoded to one data set, the same to the byte as that of a single run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.pipeline import refuse_to_overwrite, work_folder_path
from megatron_cpt.data.preprocess.report import PreprocessReport, publish_run
from megatron_cpt.data.preprocess.work_folder import WorkFolder, read_finished
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.resumable import differing_names

_COPY_BYTES = 1 << 24


def join_shards(
    output_prefix: str | os.PathLike[str], count: int, *, max_bad: int | str | None = None, overwrite: bool = False
) -> PreprocessReport:
    """Joins all shards of a data set; each token is copied once. The shards' folders are removed at the end.

    Args:
        output_prefix: as the shards were given it.
        count: shards in all.
        max_bad: give up when there are more bad lines than this, a number or a part as in "0.1%".
        overwrite: replace a data set that is already there.

    Raises:
        UserError: a shard is not there or not finished, they were made with different settings, the output exists, or
            there is no document in any of them.
        RefusedError: too many bad lines, or one shard found gigatoken wrong and others trusted it.
    """
    started, prefix, limit = time.monotonic(), os.fspath(output_prefix), bad.parse_max_bad(max_bad)
    folders = [work_folder_path(prefix, Shard(index, count)) for index in range(count)]
    begun = read_finished(work_folder_path(prefix))  # by a call that was killed when it had begun to publish
    states: list[dict[str, Any]] = []
    if begun is not None:
        settings = begun[0]
    else:
        settings, states = _finished_shards(folders)
    dtype = np.dtype(settings["dtype"]).newbyteorder("<")
    layout = OutputLayout(settings["prefixes"], dtype, settings["num_buckets"], settings["split_tokens"])
    if begun is None:
        refuse_to_overwrite(layout.prefixes, overwrite)
        state = _joined_state(states)
        limit.check(state["bad"]["count"], state["bad"]["num_lines"], "; ".join(state["bad"]["first"]))
    with WorkFolder(work_folder_path(prefix), settings) as folder:
        if begun is None:
            folder.start_from_scratch()
            for source in folders:
                _append_file(folder, os.path.join(source, bad.FILE))
            folder.save(state)
        input_bytes = sum(size for _, size, _ in settings["inputs"])
        return publish_run(folder, folders, layout, prefix, input_bytes, started)


def _finished_shards(folders: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that all shards share, and the state of each."""
    found = [read_finished(folder) for folder in folders]
    missing = [folder for folder, one in zip(folders, found, strict=True) if one is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not there or not finished; run these shards (again) first")
    shards = [one for one in found if one is not None]
    first = shards[0][0] | {"shard": None}
    for folder, (settings, _) in zip(folders, shards, strict=True):
        differ = differing_names(settings | {"shard": None}, first)
        if differ:
            raise UserError(f"{folder}: made with other settings than {folders[0]} ({', '.join(differ)}); run it again")
    wrong = [folder for folder, (_, state) in zip(folders, shards, strict=True) if state["mismatch"]]
    trusting = [folder for folder, (_, state) in zip(folders, shards, strict=True) if state["fast"]]
    if wrong and trusting:
        raise RefusedError(
            f"{wrong[0]}: found that gigatoken gives other ids with this tokenizer; run the shards that trusted it "
            f"again with --fast-tokenizer off --restart: {', '.join(trusting)}"
        )
    return first, [state for _, state in shards]


def _joined_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = [state["counts"] for state in states]
    if not any(sum(count["documents"]) for count in counts):
        raise UserError("no document in any of the shards")
    totals = {
        name: sum(count[name] for count in counts) for name in ("text_bytes", "empty_documents", "bytes_done")
    } | {
        name: [sum(of_key) for of_key in zip(*(count[name] for count in counts), strict=True)]
        for name in ("documents", "tokens")
    }
    logs = bad.joined([bad.BadLineLog(**state["bad"]) for state in states])
    return states[0] | {"counts": totals, "bad": logs.to_dict(), "mismatch": states[0]["mismatch"], "done": True}


def _append_file(folder: WorkFolder, path: str) -> None:
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        while piece := file.read(_COPY_BYTES):
            folder.append(bad.FILE, piece)
