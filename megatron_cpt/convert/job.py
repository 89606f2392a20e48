"""Work folder of a conversion: one process at a time, resumable, published by one rename.

Import and export write into a folder beside their target. Its journal says which parts are complete and on the disk:

    "5f1c..."                         SHA-256 of the job: source files with sizes and times, and all options
    {"file": "__0_0.distcp", ...}     one line per finished part

Running the same command again after an interruption keeps the parts in the journal and writes the others. If a source
file or an option has changed, the first line differs and the conversion restarts from scratch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import filelock
import orjson

from megatron_cpt.convert.system_errors import name_file_in_errors
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import sync_folder

JOURNAL_FILE = "journal.jsonl"

Advance = Callable[[int, int], None]
"""Progress callback: advance(bytes done since the last call, bytes in total), called from any thread."""


def no_progress(_: int, __: int) -> None:
    """Ignore progress."""


class JobFolder:
    """Folder in which a conversion writes its result, locked against other processes until `close`.

    Methods may be called from several threads.

    Attributes:
        path: the folder.
        records: records of finished parts, from earlier calls and this one.
    """

    def __init__(self, path: Path, target: Path, job: Any, *, needed_bytes: int) -> None:
        """Lock the target, then resume in a folder that an earlier call for the same job has left, or empty it.

        Args:
            path: the work folder, beside `target`.
            target: name under which the result is published.
            job: everything that determines the result, as plain values.
            needed_bytes: size of the result.

        Raises:
            UserError: the target exists, another process is writing it, the folder holds files that no conversion has
                written, or the disk is too small.
        """
        self.path = path
        self.records: list[Any] = []
        self._target = target
        self._journal = path / JOURNAL_FILE
        self._job = hashlib.sha256(orjson.dumps(job)).hexdigest()
        self._append_lock = threading.Lock()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under a launcher that starts the same command many times, one process converts and the others fail at once.
        self._lock = filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"{target}: another process is writing it; wait until it ends, or stop it") from error
        try:
            self._open(needed_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Unlock the target. A refused source leaves nothing, because no later call could continue its conversion."""
        if isinstance(error, RefusedError):
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Unlock the target; may be called twice."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def record(self, part: Any) -> None:
        """Add a part to the journal; its content must be on the disk."""
        line = orjson.dumps(part)
        with self._append_lock, open(self._journal, "ab") as journal:
            journal.write(line + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
            self.records.append(orjson.loads(line))

    def restart(self) -> None:
        """Empty the folder and begin a new journal."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.records = []
        self._write_journal()

    def publish(self) -> None:
        """Write everything to the disk, remove the journal and give the folder its final name."""
        for path in sorted(self.path.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                with name_file_in_errors(path), open(path, "rb") as file:
                    os.fsync(file.fileno())
        self._journal.unlink()
        sync_folder(self.path)
        if self._target.is_dir():
            self._target.rmdir()  # empty, see `refuse_existing`
        os.rename(self.path, self._target)
        sync_folder(self._target.parent)

    def _open(self, needed_bytes: int) -> None:
        refuse_existing(self._target)
        if self.path.is_dir() and any(self.path.iterdir()) and not any(self.path.glob("journal.*")):
            raise UserError(f"{self.path}: not the work of a conversion, which would overwrite it; move or delete it")
        free = shutil.disk_usage(self._target.parent).free
        written = sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file())
        if free + written < needed_bytes:
            raise UserError(
                f"{self._target.parent}: {needed_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
                "free some space or choose another disk"
            )
        job, *self.records = _read_journal(self._journal) or [None]
        if job == self._job:
            self._write_journal()  # drops a line that a power cut left incomplete
        else:
            self.restart()

    def _write_journal(self) -> None:
        temporary = self._journal.with_suffix(".tmp")
        temporary.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in (self._job, *self.records)))
        os.replace(temporary, self._journal)
        sync_folder(self.path)


def _read_journal(path: Path) -> list[Any]:
    lines: list[Any] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(orjson.loads(text))
        except ValueError:
            break  # incomplete line: ignore it and everything after it
    return lines


def refuse_existing(target: Path) -> None:
    """Raise unless nothing exists under a name, or only an empty folder.

    Raises:
        UserError: something exists.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: exists already; remove it or choose another name")


def run_parallel(work: Callable[[Any], None], items: list[Any], workers: int) -> None:
    """Call `work` on every item in threads; after the first error no further item is started.

    Threads suffice: reading, writing and hashing release Python's global lock.

    Args:
        work: function that is called with one item.
        items: items in the order in which they are started.
        workers: number of threads; 0: one per core.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, workers or os.cpu_count() or 1))
    try:
        for future in [pool.submit(work, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
