"""The end of a run of `preprocess`: its data set is published, and what it did is summed up."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.data.preprocess import bad_lines as bad
from megatron_cpt.data.preprocess.assemble import OutputLayout, make_pairs
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.files.atomic import publish


@dataclass(frozen=True)
class PreprocessReport:
    """What `preprocess` did.

    Attributes:
        output_prefix: the new data set, or what its name begins with.
        prefixes: all data sets that were published; none for a shard.
        dtype: its token type.
        documents: documents written.
        tokens: tokens written, ends of documents included.
        text_bytes: UTF-8 bytes of the documents' texts.
        input_bytes: size of the input files on disk.
        empty_documents: texts that are empty or give no token.
        lines: lines and rows that were read, bad ones included.
        bad_lines: lines left out, for they hold no text under the key.
        bad_path: where these are listed, each with file, line and reason; None if there are none.
        engine: what encoded most documents.
        mismatch: the text in which gigatoken was found wrong, so that everything was encoded again; None: nowhere.
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
    bad_path: str | None
    engine: str
    mismatch: str | None
    seconds: float


def publish_run(
    folder: WorkFolder,
    sources: Sequence[str],
    layout: OutputLayout,
    prefix: str,
    input_bytes: int,
    started: float,
) -> PreprocessReport:
    """Makes the pairs of a finished run, publishes them, and removes its folder.

    Killed anywhere in between, it does the rest when it is called again.

    Args:
        folder: the run's own folder, with a state of all that is published.
        sources: folders that hold the tokens; `folder` itself, or those of shards.
        layout: of the data sets.
        prefix: of the run.
        input_bytes: for the report.
        started: for the report, by `time.monotonic`.
    """
    if "renames" not in folder.state:
        renames, prefixes = make_pairs(layout, sources, folder.path)
        folder.save(folder.state | {"renames": renames, "prefixes": prefixes})
    publish([(source, target) for source, target in folder.state["renames"]])
    bad_path = f"{prefix}.bad.jsonl"
    if os.path.exists(folder.file(bad.FILE)):
        publish([(folder.file(bad.FILE), bad_path)])
    elif not folder.state["bad"]["count"]:
        Path(bad_path).unlink(missing_ok=True)  # of a data set that was replaced
    report = sum_up(folder.state, layout, prefix, input_bytes, started)
    for source in sources:
        shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(folder.path, ignore_errors=True)
    return report


def sum_up(
    state: dict[str, Any], layout: OutputLayout, prefix: str, input_bytes: int, started: float
) -> PreprocessReport:
    """Sums up a state."""
    counts, log = state["counts"], state["bad"]
    return PreprocessReport(
        output_prefix=prefix,
        prefixes=state.get("prefixes", []),
        dtype=layout.dtype.name,
        documents=sum(counts["documents"]),
        tokens=sum(counts["tokens"]),
        text_bytes=counts["text_bytes"],
        input_bytes=input_bytes,
        empty_documents=counts["empty_documents"],
        lines=log["num_lines"],
        bad_lines=log["count"],
        bad_path=f"{prefix}.bad.jsonl" if log["count"] and "prefixes" in state else None,
        engine=state["engine"],
        mismatch=state["mismatch"],
        seconds=time.monotonic() - started,
    )
