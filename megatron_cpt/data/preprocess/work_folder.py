"""Work folder of one `preprocess` run: files that only grow, and a state that says how much of each file counts.

The state is replaced as a whole, after the bytes that it counts were forced to disk. A resumed run truncates each file
to its counted length. Example: the state counts 1,000 bytes of `0.tokens`; a kill leaves 1,300 bytes; the resumed run
continues to write at byte 1,000.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import orjson

from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.resumable import ResumableFolder, read_settings
from megatron_cpt.files.system_errors import name_file_in_errors

STATE_FILE = "state.json"


class WorkFolder(ResumableFolder):
    """Locked work folder whose files are appended to; see `ResumableFolder`.

    Attributes:
        state: the last saved state; empty at the start.
    """

    def __init__(self, path: str, settings: Mapping[str, Any], *, should_restart: bool = False) -> None:
        super().__init__(Path(path), settings, progress_file=STATE_FILE, should_restart=should_restart)
        self.state: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._truncated, self._changed = set[str](), set[str]()
        self._saver = ThreadPoolExecutor(1, "work-folder")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        saved = _read_state(self.path)
        if saved is not None:
            self.state, self._lengths = saved["state"], saved["lengths"]
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._finish_saving()
        except OSError:
            if error[0] is None:  # otherwise the earlier error is the one to report
                raise
        finally:
            self._saver.shutdown()
            super().__exit__(None, None, None)

    def file(self, name: str) -> str:
        """Return the path of one of the folder's files."""
        return os.path.join(self.path, name)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Append bytes to a file; they count once a later `save` is complete."""
        length = self._lengths.get(name, 0)
        with name_file_in_errors(self.path / name), open(self.file(name), "ab", buffering=0) as file:
            if name not in self._truncated:
                file.truncate(length)
                self._truncated.add(name)
            view = memoryview(data).cast("B")
            while view.nbytes:  # one write takes at most 2 GiB
                view = view[file.write(view) :]
        self._lengths[name] = length + memoryview(data).nbytes
        self._changed.add(name)

    def save(self, state: Mapping[str, Any]) -> None:
        """Make everything appended so far count, together with a state."""
        self.save_in_background(state)
        self._finish_saving()

    def save_in_background(self, state: Mapping[str, Any]) -> None:
        """Start `save` in a thread; first wait until the previous save is complete."""
        self._finish_saving()
        self.state = dict(state)
        content = orjson.dumps({"lengths": self._lengths, "state": self.state})
        changed, self._changed = self._changed, set()
        self._saving = self._saver.submit(self._write_state, changed, content)

    def start_from_scratch(self) -> None:
        """Empty the folder and record this run's settings."""
        self._finish_saving()
        super().start_from_scratch()
        self.state, self._lengths, self._truncated, self._changed = {}, {}, set(), set()

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        self._finish_saving()
        super().remove()

    def _write_state(self, changed: Iterable[str], content: bytes) -> None:
        for name in changed:
            with open(self.file(name), "rb") as file:
                os.fsync(file.fileno())
        write_atomically(self.path / STATE_FILE, content)

    def _finish_saving(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def read_finished(path: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the settings and the state of a finished shard; None if its folder is missing or not finished."""
    settings, saved = read_settings(Path(path)), _read_state(Path(path))
    if settings is None or saved is None or not saved["state"].get("done"):
        return None
    return settings, saved["state"]


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        saved: dict[str, Any] = orjson.loads((folder / STATE_FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    is_valid = isinstance(saved, dict) and all(isinstance(saved.get(key), dict) for key in ("state", "lengths"))
    return saved if is_valid and all(type(n) is int and 0 <= n < 2**60 for n in saved["lengths"].values()) else None
