"""First start of a run: never over the traces of a run whose checkpoints are gone or over files of another program."""

from __future__ import annotations

import logging
import os
import uuid
from itertools import count
from pathlib import Path

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.config.quantities import expand_paths
from megatron_cpt.config.yamlfile import read_mapping
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import sync_folder, write_atomically
from megatron_cpt.files.whole_io import exists, read_file
from megatron_cpt.provenance.plans_file import FILE_NAME as PLANS_FILE
from megatron_cpt.provenance.plans_file import StartedRun, read_started_run
from megatron_cpt.provenance.run_history import ANOMALIES_FILE, EVENTS_FILE, METRICS_FILE
from megatron_cpt.report.write_report import REPORT_FILE

logger = logging.getLogger(__name__)

GIVEN_FILE = "run.given.yaml"
# plans.jsonl first: without it a kill between two renames leaves traces that are refused, never a start over them.
_TRACES = (PLANS_FILE, layout.RUN_FILE, layout.PLAN_FILE, METRICS_FILE, ANOMALIES_FILE, EVENTS_FILE, REPORT_FILE)


def refuse_lost_run(output: Path) -> None:
    """Refuse to start from scratch in a run directory with traces of a run, unless that run has never saved.

    A run that was killed before its first checkpoint has lost nothing that it could resume from, so it starts over:
    plans.jsonl has its id, and does not say that a checkpoint was published. The user's own run.yaml may be stored
    in the output that it names.

    Raises:
        RefusedError: the checkpoints are gone or not mounted, or the files are of another program.
    """
    folder, started = layout.checkpoints_folder(output), read_started_run(output)
    had_checkpoints = layout.has_latest(folder) or (started is not None and started.has_saved)
    if started is not None and not had_checkpoints:
        return
    traces = [name for name in _TRACES if exists(output / name)]
    if layout.has_latest(folder):
        traces.append(f"{folder.name}/{layout.LATEST_FILE}")
    if traces and not (traces == [layout.RUN_FILE] and _names_output(output / layout.RUN_FILE, output)):
        reason = (
            f"the checkpoints of this run are gone or not mounted: restore or mount {folder}"
            if had_checkpoints
            else "these files are of another program, or of an earlier version: move them away"
        )
        raise RefusedError(
            f"output: {output}: no checkpoint, but {', '.join(traces)}: {reason}, or choose another output; to start "
            "from scratch here, add --restart: it keeps these files in before-restart-1/"
        )


def _names_output(run_file: Path, output: Path) -> bool:
    try:
        named = expand_paths(read_mapping(run_file).get("output"))
    except (UserError, ValueError):
        return False
    return isinstance(named, str) and os.path.realpath(named) == os.path.realpath(output)


def keep_given_run_file(output: Path) -> None:
    """Keep the user's run.yaml in the output as run.given.yaml, before the resolved one replaces it."""
    if exists(output / layout.RUN_FILE) and not exists(output / PLANS_FILE):
        write_atomically(output / GIVEN_FILE, read_file(output / layout.RUN_FILE))


def set_aside(output: Path) -> None:
    """Move the files of an earlier run to `before-restart-N/`, for `--restart`.

    Raises:
        OSError: a file cannot be moved.
    """
    present = [name for name in (*_TRACES, "tensorboard") if exists(output / name)]
    if present:
        aside = next(path for number in count(1) if not (path := output / f"before-restart-{number}").exists())
        aside.mkdir()
        for name in present:
            os.rename(output / name, aside / name)
        sync_folder(aside)
        sync_folder(output)
        logger.info("--restart: %s now has the files of the earlier run: %s", aside, ", ".join(present))
    if layout.has_latest(layout.checkpoints_folder(output)):  # not renamed: the folder may be another file system
        (layout.checkpoints_folder(output) / layout.LATEST_FILE).unlink()


def choose_run_id(own: SavedRun | None, started: StartedRun | None) -> str:
    """Return the id of a run; a collective call.

    Args:
        own: the checkpoint that the run resumes from; None: it starts.
        started: the run that the directory belongs to; None: unknown, or the run starts over.
    """
    known = (own and own.run_id) or (started and started.run_id)
    return known or on_main(lambda: uuid.uuid4().hex[:16])
