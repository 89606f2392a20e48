"""Where a run of `preprocess` keeps what it has done, so that it can be killed at any moment and go on.

The folder holds files that only grow, and `state.json`, which says how long each of them is as far as it counts. The
state is replaced as a whole, after the files it speaks of were forced to disk; what a file holds beyond its length
there is cut off when the run goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import orjson

from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import sync_folder


class WorkFolder:
    """Context manager that holds the folder's lock.

    Args:
        path: the folder; made if it is missing.
        settings: all that decides what is written. A folder with other settings is not used.
        restart: empty the folder first.

    Attributes:
        state: what was saved last; empty at the start.

    Raises:
        UserError: another process works in it, it is of a run with other settings, or it cannot be written.
    """

    def __init__(self, path: str, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.state: dict[str, Any] = {}
        self._settings = dict(settings)
        self._restart = restart
        self._lengths: dict[str, int] = {}
        self._touched: set[str] = set()
        self._changed: set[str] = set()
        self._lock: IO[bytes] | None = None
        self._saver = ThreadPoolExecutor(1, "work-folder")
        self._saving: Future[None] | None = None

    def __enter__(self) -> WorkFolder:
        try:
            os.makedirs(self.path, exist_ok=True)
            self._lock = open(self.file("lock"), "ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise UserError(f"{self.path}: another process is writing there; wait for it or end it") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            if self._restart:
                self.clear()
            self._load()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._finish_saving()
        except OSError:
            if kind is None:  # else what went wrong first is told
                raise
        finally:
            self._saver.shutdown()
            self._unlock()

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return os.path.join(self.path, name)

    def length(self, name: str) -> int:
        """How much of a file counts, in bytes."""
        return self._lengths.get(name, 0)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Writes behind what counts of a file."""
        with open(self.file(name), "ab", buffering=0) as file:
            if name not in self._touched:
                file.truncate(self.length(name))
                self._touched.add(name)
            view = memoryview(data).cast("B")
            while view.nbytes:  # one write takes at most 2 GiB
                view = view[file.write(view) :]
        self._lengths[name] = self.length(name) + memoryview(data).nbytes
        self._changed.add(name)

    def save(self, state: Mapping[str, Any]) -> None:
        """Makes all that was appended count, together with a state."""
        self.save_behind(state)
        self._finish_saving()

    def save_behind(self, state: Mapping[str, Any]) -> None:
        """The same, but goes on while the disk works; a save that is still under way is waited for first."""
        self._finish_saving()
        self.state = dict(state)
        content = orjson.dumps({"lengths": self._lengths, "state": self.state})
        changed, self._changed = self._changed, set()
        self._saving = self._saver.submit(self._write_state, changed, content)

    def _write_state(self, changed: Iterable[str], content: bytes) -> None:
        for name in changed:
            with open(self.file(name), "rb") as file:
                os.fsync(file.fileno())
        self._write("state.json", content)

    def _finish_saving(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def clear(self) -> None:
        """Removes everything but the lock."""
        self._finish_saving()
        for name in os.listdir(self.path):
            if name != "lock":
                os.unlink(self.file(name))
        self.state, self._lengths = {}, {}
        self._touched.clear()
        self._changed.clear()

    def begin(self) -> None:
        """Names the settings of what follows."""
        self._write("settings.json", orjson.dumps(self._settings))

    def remove(self) -> None:
        """Removes the folder."""
        self._finish_saving()
        shutil.rmtree(self.path)

    def _load(self) -> None:
        try:
            saved = orjson.loads(Path(self.file("state.json")).read_bytes())
            settings = orjson.loads(Path(self.file("settings.json")).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            self.clear()  # killed before its first save
            self.begin()
            return
        differ = differences(settings, self._settings)
        if differ:
            raise UserError(
                f"{self.path}: holds a run that was stopped, with other settings ({', '.join(differ)}); give those "
                "again to go on, or --restart to begin anew"
            )
        self.state, self._lengths = saved["state"], saved["lengths"]

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.file(f"{name}.tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.file(name))
        sync_folder(Path(self.path))

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are not equal, compared as JSON holds them."""
    plain = orjson.loads(orjson.dumps(dict(other)))
    return sorted(name for name in one.keys() | plain.keys() if one.get(name) != plain.get(name))


def read_finished(path: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and state of a shard's folder whose run has ended; None if it has not, or there is none."""
    with contextlib.suppress(OSError, orjson.JSONDecodeError, KeyError):
        settings = orjson.loads(Path(path, "settings.json").read_bytes())
        state = orjson.loads(Path(path, "state.json").read_bytes())["state"]
        if state["done"]:
            return settings, state
    return None
