"""Checks of a run's data, and of the space and speed of the disk under its output folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.errors import CptError

if TYPE_CHECKING:
    from megatron_cpt.prepare import PreparedRun

_GB = 1e9
_TEST_BYTES = 256 * 2**20
_CHUNK = 8 * 2**20
_OPTIMIZER_BYTES = 12  # per parameter: fp32 copy and the two moments of Adam
_SIGNAL_SECONDS = 600  # signal before the time limit in examples/nemotron4_15b/train.sbatch; a save may take half of it


@dataclass(frozen=True)
class Disk:
    """Measured space and speed under a folder.

    Attributes:
        free: bytes.
        write: bytes per second of one process, including fsync.
        read: bytes per second of one process; the page cache may make it too high.
        problem: reason why the folder cannot be written, or None.
    """

    free: int
    write: float = 0.0
    read: float = 0.0
    problem: str | None = None


def read_run(path: str, overrides: Sequence[str]) -> tuple[PreparedRun | None, Diagnosis]:
    """Prepare a run; return None instead of the run if it could not start, and the finding."""
    from megatron_cpt.prepare import prepare_run

    try:
        prepared = prepare_run(path, overrides, need_files=True, num_gpus=None)
    except CptError as error:
        return None, Diagnosis(
            "run", Level.BLOCKS, str(error), "`train` ends with this message", "correct run.yaml or the files it names"
        )
    sources = len(prepared.prefixes)
    tokens = sum(prepared.source_tokens.values())
    return prepared, passed(
        "run", f"{prepared.config.name}: {sources} sources, {tokens / 1e9:.4g}B tokens; all files found"
    )


def checkpoint_bytes(prepared: PreparedRun) -> int:
    """Return the size of one checkpoint: weights in the training precision, optimizer state and average in fp32."""
    weight = 4 if prepared.config.precision.compute == "fp32" else 2
    average = 4 if prepared.config.ema is not None else 0
    return prepared.plan.parameters.total * (weight + _OPTIMIZER_BYTES + average)


def try_disk(folder: Path, size: int = _TEST_BYTES) -> Disk:
    """Measure the disk of a folder, or of its nearest existing parent, with a file of `size` bytes; it is deleted."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    path = folder / f".megatron-cpt-doctor-{uuid.uuid4().hex}"
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        return Disk(free, problem=f"{folder}: {free / _GB:.3g} GB free, too little for a test file")
    try:
        write = _write(path, size)
        read = _read(path)
    except OSError as error:
        return Disk(free, problem=str(error))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return Disk(free, size / write, size / read)


def check_output(folder: str, disk: Disk) -> Diagnosis:
    """Check that the output folder can be written; report its speed."""
    if disk.problem is not None:
        return Diagnosis("output", Level.BLOCKS, disk.problem, "no checkpoint can be saved", f"make {folder} writable")
    found = (
        f"{folder}: writes {disk.write / _GB:.3g} GB/s with fsync, reads {disk.read / _GB:.3g} GB/s with one process"
    )
    return passed("output", found)


def num_checkpoints(prepared: PreparedRun) -> int:
    """Return the number of checkpoints on the disk at the end of the run, without one being written."""
    settings, steps = prepared.config.checkpoint, prepared.plan.steps
    saved = 1 + (steps - 1) // settings.every if settings.every else 1
    kept_forever = steps // settings.keep_every if settings.keep_every else 0
    return saved if settings.keep is None else min(saved, settings.keep + kept_forever)


def check_space(size: int, count: int, free: int) -> Diagnosis:
    """Compare the free bytes with `count` checkpoints of `size` bytes that are kept, and one that is being written."""
    needed = size * (count + 1)
    kept = "1 is kept" if count == 1 else f"{count} are kept"
    found = f"{free / _GB:.4g} GB free; a checkpoint takes about {size / _GB:.3g} GB, {kept}"
    if free >= needed:
        return passed("space", found)
    level = Level.BLOCKS if free < 2 * size else Level.WARNING
    cost = f"these and one being written take {needed / _GB:.4g} GB: a save will fail"
    return Diagnosis("space", level, found, cost, "free some space, lower checkpoint.keep, or raise checkpoint.every")


def check_save_time(size: int, disk: Disk, num_writers: int) -> Diagnosis:
    """Estimate the seconds of a save from the speed of one process; shared storage may be slower."""
    seconds = size / (disk.write * num_writers)
    writers = "1 rank" if num_writers == 1 else f"{num_writers} ranks"
    found = f"about {seconds:.0f} s for {size / _GB:.3g} GB by {writers}, if each writes as fast as this one"
    if seconds <= _SIGNAL_SECONDS / 2:
        return passed("time of a save", found)
    cost = f"a signal {_SIGNAL_SECONDS} s before the time limit may be too late"
    return Diagnosis(
        "time of a save", Level.WARNING, found, cost, "use faster storage, or an earlier signal (--signal=USR1@...)"
    )


def _write(path: Path, size: int) -> float:
    chunk = os.urandom(_CHUNK)  # random bytes, because some storage compresses
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _read(path: Path) -> float:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drop the page cache, so that the disk is read
        start = time.perf_counter()
        while file.read(_CHUNK):
            pass
    return time.perf_counter() - start
