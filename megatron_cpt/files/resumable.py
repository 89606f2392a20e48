"""Work that can be killed at any moment and resumed by running the same command again.

Three parts make a job resumable:

1. a lock, so that two processes never work on the same result (`ResumableFolder`);
2. a record of the settings that the unfinished work belongs to, so that work of other settings is never continued
   (`ResumableFolder`);
3. a progress file that says which parts of the work are finished and on the disk: a `DurableJournal`, or a state that
   is replaced as a whole (`megatron_cpt.data.preprocess.work_folder`).

    with ResumableFolder(output.with_name("out.partial"), settings, progress_file="journal.jsonl") as folder:
        journal = DurableJournal(folder.path / "journal.jsonl")
        finished = {line["file"] for line in journal.lines}
        for part in parts:
            if part.name not in finished:
                write_and_sync(folder.path / part.name)
                journal.record({"file": part.name})
        folder.publish_as(output)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import filelock
import orjson

from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import sync_folder, write_atomically
from megatron_cpt.files.retry import is_path_error, retry_disk
from megatron_cpt.files.whole_io import DiskFile, exists, is_regular_file, read_file

SETTINGS_FILE = "settings.json"


class ResumableFolder:
    """Work folder of one job, locked between `__enter__` and `__exit__`.

    The lock file lies outside the folder, so the folder can be emptied, removed or renamed while the lock is held. The
    system releases the lock of a killed process.

    Args:
        path: the folder; created if missing. `publish_as` needs it on the file system of the result.
        settings: everything that decides the result, as values that JSON can hold.
        progress_file: name of the file that records progress. A folder without it holds nothing worth keeping, and
            its settings do not matter.
        lock_path: the lock file; None: `.NAME.lock` beside the folder.
        should_restart: discard earlier progress (`--restart`).
        should_discard_other_settings: start from scratch if the earlier progress belongs to other settings, instead
            of raising.

    Raises:
        UserError: from `__enter__`: another process holds the lock, the folder holds progress of other settings or
            files of something else, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        progress_file: str,
        lock_path: Path | None = None,
        should_restart: bool = False,
        should_discard_other_settings: bool = False,
    ) -> None:
        self.path = path
        self._settings = orjson.loads(orjson.dumps(dict(settings)))  # as a later process reads them
        self._progress_path = path / progress_file
        self._should_restart = should_restart
        self._should_discard_other_settings = should_discard_other_settings
        self._lock_path = lock_path or path.with_name(f".{path.name}.lock")
        self._lock = filelock.FileLock(self._lock_path, timeout=0, thread_local=False)

    def __enter__(self) -> Self:
        try:
            retry_disk(self.path, lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
            retry_disk(self._lock_path, self._lock.acquire)
        except filelock.Timeout as error:
            raise UserError(f"{self.path}: another process is working on it; wait until it ends, or stop it") from error
        except OSError as error:
            if not is_path_error(error):
                raise
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; choose another output") from error
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._release()

    def start_from_scratch(self) -> None:
        """Empty the folder and record this job's settings."""
        if self.path.is_dir():
            _empty(self.path, self._progress_path)
        self.path.mkdir(exist_ok=True)
        write_atomically(self.path / SETTINGS_FILE, orjson.dumps(self._settings))

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        _empty(self.path, self._progress_path)
        shutil.rmtree(self.path)

    def publish_as(self, target: Path) -> None:
        """Give the finished folder its final name, then remove this module's files; `target` is free or empty.

        In this order a kill leaves either a folder that the next call resumes, or a complete target.
        """
        if target.is_dir():
            target.rmdir()
        os.rename(self.path, target)
        try:
            sync_folder(target.parent)
        finally:
            for name in (self._progress_path.name, SETTINGS_FILE):
                (target / name).unlink(missing_ok=True)
        sync_folder(target)

    def _open(self) -> None:
        settings = read_settings(self.path)
        if settings is not None and 2 * len(settings.keys() & self._settings.keys()) < len(self._settings):
            settings = None  # the settings of another program
        # A kill may leave a folder that is empty, but for settings that are half written.
        is_empty = not self.path.is_dir() or all(path.name == f".{SETTINGS_FILE}.tmp" for path in self.path.iterdir())
        if settings is None and not is_empty:
            raise UserError(
                f"{self.path}: holds files of something else; move or delete it, it is needed as work folder"
            )
        if settings is None or not self._progress_path.exists() or self._should_restart:
            self.start_from_scratch()
            return
        names = differing_names(settings, self._settings)
        if names and self._should_discard_other_settings:
            self.start_from_scratch()
        elif names:
            raise UserError(
                f"{self.path}: holds an interrupted run with other settings (different: {', '.join(names)}); give the "
                "same settings again to resume it, or --restart to discard it"
            )

    def _release(self) -> None:
        # Removed while the lock is held: filelock never takes a lock on a file that has lost its name.
        self._lock_path.unlink(missing_ok=True)
        self._lock.release()


class DurableJournal:
    """Append-only record of finished parts, one JSON value per line; each line is on the disk when `record` returns.

    Several threads may call `record`. A last line that a kill or a power cut left incomplete is dropped.

    Attributes:
        lines: everything recorded, by earlier processes and this one.
    """

    def __init__(self, path: Path) -> None:
        self.lines: list[Any] = []
        self._path = path
        self._mutex = threading.Lock()
        content = read_file(path) if is_regular_file(path) else b""
        for line in content.splitlines():
            try:
                self.lines.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                break
        complete = b"".join(orjson.dumps(line) + b"\n" for line in self.lines)
        if complete != content:
            write_atomically(path, complete)

    def record(self, line: Any) -> None:
        """Append a value; call it only once the part it names is on the disk."""
        content = orjson.dumps(line)
        with self._mutex:
            is_new = not exists(self._path)
            with DiskFile(self._path, "ab") as file:
                file.write(content + b"\n")
                file.sync()
            if is_new:
                sync_folder(self._path.parent)
            self.lines.append(orjson.loads(content))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that a work folder belongs to; None if it has none that can be read."""
    if not is_regular_file(folder / SETTINGS_FILE):
        return None
    with contextlib.suppress(orjson.JSONDecodeError):
        settings = orjson.loads(read_file(folder / SETTINGS_FILE))
        return settings if isinstance(settings, dict) else None
    return None


def differing_names(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that are not equal, or exist in one of the two only."""
    return sorted(name for name in settings.keys() | others.keys() if settings.get(name) != others.get(name))


def _empty(folder: Path, progress_path: Path) -> None:
    """Delete the progress first and the settings last: a kill in between leaves a folder that starts from scratch."""
    progress_path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != SETTINGS_FILE:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
