"""What import and export share: the name that must be free, the disk that must be large enough, threads, one rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.journal import JOURNAL_FILE
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.files.atomic import sync_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Advance = Callable[[int, int], None]
"""Called with the bytes done since the last call, and all of them."""


def silent(_: int, __: int) -> None:
    """No progress bar."""


def check_target(target: Path) -> None:
    """Is the name free?

    Raises:
        UserError: something is there.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: exists already; remove it or choose another name")


@contextlib.contextmanager
def reserved(target: Path, aside: Path) -> Iterator[None]:
    """Inside the block nobody else makes `target`, and `aside` is a work folder or nothing.

    A lock lies beside the target: under a launcher that starts the same command many times, the first one works.

    Raises:
        UserError: somebody does, or `aside` holds something else, which would be emptied.
        RefusedError: of the block; `aside` is gone then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{target}: another process is making it; wait for it or end it") from error
        try:
            check_target(target)
            if aside.is_dir() and any(aside.iterdir()) and not any(aside.glob("*journal.*")):
                raise UserError(f"{aside}: not the work of a conversion, and in its place; move it or delete it")
            yield
        except RefusedError:
            shutil.rmtree(aside, ignore_errors=True)  # a source that is refused leaves nothing
            raise
        finally:
            path.unlink()
    finally:
        os.close(lock)


_WAYS_OUT = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write smaller files (--shard-size)",
    errno.EIO: "the disk does not read or write this file: look into the kernel's log, take a copy from elsewhere",
    errno.ENOENT: "it was there before: leave the folders alone while they are read and written",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside the block the system's errors say which file they are about; calls on a descriptor leave it out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def os_errors_as_cpt_errors(aside: Path | None = None) -> Iterator[None]:
    """Inside the block an error of the system ends in one message: which file, why, the way out, and what is kept.

    Args:
        aside: the work folder, if there is one.

    Raises:
        CptError: status 1; neither the user's mistake nor a fault of the source.
    """
    try:
        yield
    except OSError as error:
        way_out = f"; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else ""
        kept = ""
        if aside is not None and (aside / JOURNAL_FILE).is_file():
            kept = f". What is finished stays in {aside}; the same command goes on there"
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        raise CptError(f"{files or 'the system'}: {error.strerror or error}{way_out}{kept}") from error


def check_space(folder: Path, needed: int, aside: Path) -> None:
    """Is the disk large enough? What an earlier call has written counts.

    Raises:
        UserError: it is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    there = sum(file.stat().st_blocks * 512 for file in aside.rglob("*") if file.is_file()) if aside.is_dir() else 0
    if free + there < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or take another disk"
        )


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with named(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def publish(aside: Path, target: Path) -> None:
    """Give a finished folder its name."""
    if target.is_dir():
        target.rmdir()  # empty: see `check_target`
    sync_folder(aside)
    os.rename(aside, target)
    sync_folder(target.parent)


def run_parallel(work: Callable[[Any], None], items: list[Any], workers: int) -> None:
    """Call `work` on every item in threads; the first error ends the rest. Files and hashes release the lock."""
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        for future in [pool.submit(work, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another type.

    Raises:
        RefusedError: its weights are too large for that type.
    """
    result = tensor.to(dtype)
    if dtype is not tensor.dtype and not _is_finite(result) and _is_finite(tensor):
        raise RefusedError(f"{name}: holds weights up to {tensor.abs().max().item():.4g}, too large for {dtype}")
    return result


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # one pass, no temporaries; NaN wins over everything
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Are all weights numbers?

    Raises:
        RefusedError: one is not.
    """
    if not _is_finite(tensor):
        raise RefusedError(f"{name}: holds weights that are not finite; --allow-nan takes them as they are")
