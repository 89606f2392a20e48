"""Lock of a run directory: two runs never train in one output."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import orjson

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import read_file

LOCK_FILE, HOLDER_FILE = ".lock", "lock.json"
WAIT_SECONDS = 5.0
"""Seconds to wait for the lock: a job that is requeued may start while its predecessor still ends."""

_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(output: Path, *, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of a run directory on rank 0; entering is a collective call.

    The system releases the lock when its process ends, also when it is killed or another machine holds it over NFS, so
    no lock is ever stale. `lock.json` says who holds it. If the run fails before it writes anything else, the
    directory is removed again.

    Args:
        output: the run directory; created if missing.
        wait: seconds to wait for another holder to end.

    Raises:
        UserError: another process holds it.
        CptError: the directory cannot be written.
    """
    held: list[filelock.BaseFileLock] = []
    created: list[Path] = []
    try:
        on_main(lambda: _acquire(output, wait, held, created))
        yield
    finally:
        for lock in held:  # on the main rank only
            # Removed while the lock is held: filelock never takes a lock on a file that has lost its name.
            for name in (HOLDER_FILE, LOCK_FILE):
                with contextlib.suppress(OSError):  # a lock must be released on a disk that has failed, too
                    (output / name).unlink()
            lock.release()
            with contextlib.suppress(OSError):  # not empty: the run has written something
                for folder in created:
                    folder.rmdir()


def _missing_folders(output: Path) -> list[Path]:
    """Return the folders that must be created for the output, the innermost first."""
    return [folder for folder in (output, *output.parents) if not folder.exists()]


def _acquire(output: Path, wait: float, held: list[filelock.BaseFileLock], created: list[Path]) -> None:
    lock = filelock.FileLock(output / LOCK_FILE, timeout=wait, thread_local=False)
    try:
        created += _missing_folders(output)
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        held.append(lock)
        if (output / HOLDER_FILE).exists():
            logger.info("output: %s: the earlier run ended without releasing its lock: %s", output, _holder(output))
        write_atomically(output / HOLDER_FILE, orjson.dumps(_own_entry(), option=orjson.OPT_INDENT_2))
    except filelock.Timeout as error:
        raise UserError(
            f"output: {output}: another run is training in it ({_holder(output)}); wait until it ends, stop it, or "
            "choose another output"
        ) from error
    except NotImplementedError:
        logger.warning(
            "output: %s: this file system has no locks, so a second run in it would not be noticed; do not start one",
            output,
        )
    except OSError as error:
        raise CptError(
            f"{error.filename or output}: {error.strerror}: the run directory cannot be written; free some space or "
            "choose another output"
        ) from error


def _own_entry() -> dict[str, str | int | None]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": next((os.environ[name] for name in _JOB_VARIABLES if name in os.environ), None),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(output: Path) -> str:
    """Describe the holder of the lock, such as `process 4711 on node3, job 99, since 2026-01-31 12:00:00`."""
    try:
        entry = orjson.loads(read_file(output / HOLDER_FILE))
    except (OSError, orjson.JSONDecodeError):
        entry = None
    if not isinstance(entry, dict):
        return "it does not say which"
    job = f", job {entry['job']}" if entry.get("job") else ""
    return f"process {entry.get('pid')} on {entry.get('host')}{job}, since {entry.get('since')}"
