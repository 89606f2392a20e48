"""What a run reads and writes: its data, its output, the space and the speed of that disk."""

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
_OPTIMIZER_BYTES = 12  # a parameter's fp32 copy and Adam's two moments
_SIGNAL_SECONDS = 600  # before the time limit, in examples/nemotron4_15b/train.sbatch; half of it should do


@dataclass(frozen=True)
class Disk:
    """A folder that was tried.

    Attributes:
        free: bytes.
        write, read: bytes/s of one process; writing to the end of fsync. Reading may come from memory.
        problem: why it cannot be written.
    """

    free: int
    write: float = 0.0
    read: float = 0.0
    problem: str | None = None


def read_run(path: str, overrides: Sequence[str]) -> tuple[PreparedRun | None, Diagnosis]:
    """A run.yaml with its data; None, and what is wrong, where it could not start."""
    from megatron_cpt.prepare import prepare_run

    try:
        prepared = prepare_run(path, overrides, need_files=True, num_gpus=None)
    except CptError as error:
        return None, Diagnosis(
            "run", Level.BLOCKS, str(error), "it would end with this message", "correct it; see above"
        )
    sources = len(prepared.prefixes)
    tokens = sum(prepared.source_tokens.values())
    return prepared, passed("run", f"{prepared.config.name}: {sources} sources, {tokens / 1e9:.4g}B tokens, all here")


def checkpoint_bytes(prepared: PreparedRun) -> int:
    """Size of one checkpoint: weights as they train, and the optimizer in fp32."""
    weight = 4 if prepared.config.precision.compute == "fp32" else 2
    return prepared.plan.parameters.total * (weight + _OPTIMIZER_BYTES)


def try_disk(folder: Path, size: int = _TEST_BYTES) -> Disk:
    """Write a file, flush it to the disk, and read it again; it is gone afterwards.

    Args:
        folder: or the nearest one above it that is there.
        size: bytes to write.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    path = folder / f".megatron-cpt-doctor-{uuid.uuid4().hex}"
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        return Disk(free, problem=f"{folder}: {free / _GB:.3g} GB free, too little to try")
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
    """Whether the output can be written."""
    if disk.problem is not None:
        return Diagnosis("output", Level.BLOCKS, disk.problem, "nothing can be saved", f"make {folder} writable")
    found = f"{folder}: writes {disk.write / _GB:.3g} GB/s with fsync, reads {disk.read / _GB:.3g} GB/s, one process"
    return passed("output", found)


def num_checkpoints(prepared: PreparedRun) -> int:
    """How many lie on the disk at the end of the run, beside the one that is being written."""
    settings, steps = prepared.config.checkpoint, prepared.plan.steps
    saved = 1 + (steps - 1) // settings.every if settings.every else 1
    for_ever = steps // settings.keep_every if settings.keep_every else 0
    return saved if settings.keep is None else min(saved, settings.keep + for_ever)


def check_space(size: int, count: int, free: int) -> Diagnosis:
    """Room for the checkpoints that stay, and for the one that is being written.

    Args:
        size: of one, in bytes.
        count: that stay.
        free: bytes.
    """
    needed = size * (count + 1)
    found = f"{free / _GB:.4g} GB free; a checkpoint takes about {size / _GB:.3g} GB, {count} of them stay"
    if free >= needed:
        return passed("space", found)
    level = Level.BLOCKS if free < 2 * size else Level.WARNING
    cost = f"these and the one being written take {needed / _GB:.4g} GB: a save will fail"
    return Diagnosis("space", level, found, cost, "make room, lower checkpoint.keep, or save less often")


def check_save_time(size: int, disk: Disk, num_writers: int) -> Diagnosis:
    """How long a save takes, if every rank writes as fast as this process did: shared storage may be slower."""
    seconds = size / (disk.write * num_writers)
    found = f"about {seconds:.0f} s for {size / _GB:.3g} GB by {num_writers} ranks, if each writes as fast as this one"
    if seconds <= _SIGNAL_SECONDS / 2:
        return passed("time of a save", found)
    cost = f"a signal {_SIGNAL_SECONDS} s before the time limit may be too late"
    return Diagnosis(
        "time of a save", Level.WARNING, found, cost, "faster storage, or an earlier signal (--signal=USR1@...)"
    )


def _write(path: Path, size: int) -> float:
    chunk = os.urandom(_CHUNK)  # storage that compresses must not look fast
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _read(path: Path) -> float:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, where the kernel agrees
        start = time.perf_counter()
        while file.read(_CHUNK):
            pass
    return time.perf_counter() - start
