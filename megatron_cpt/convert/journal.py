"""What of a conversion is done: one line a finished file, on the disk before the next one begins.

A conversion that was killed goes on where it was. What it had not finished is written anew; what it had finished is
kept only if the job is the same: the same source files, unchanged, and the same options.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.data.durable import sync_folder

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The journal of one work folder; calls may come from several threads.

    Attributes:
        folder: the work folder.
        done: what was recorded for each finished file.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        """Open a work folder: go on in it if it belongs to this job, else empty it.

        Args:
            folder: where the result is written aside.
            job: what decides the result, as plain values.
        """
        self.folder = folder
        self._lock = threading.Lock()
        self._path = folder / JOURNAL_FILE
        header = orjson.loads(orjson.dumps({"job": job}))
        lines = _read_lines(self._path)
        self.done: dict[str, Any] = {}
        if lines[:1] == [header]:
            self.done = {line["file"]: line for line in lines[1:] if _is_there(folder, line)}
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._rewrite(header)

    def record(self, file: str, size: int, **values: Any) -> None:
        """A file is complete and on the disk."""
        line = {"file": file, "size": size, **values}
        with self._lock, open(self._path, "ab") as journal:
            journal.write(orjson.dumps(line) + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
            self.done[file] = orjson.loads(orjson.dumps(line))

    def remove(self) -> None:
        """The work is done: the journal goes before the result is published."""
        self._path.unlink()

    def _rewrite(self, header: dict[str, Any]) -> None:
        """Without a line that a power cut left half written."""
        aside = self._path.with_suffix(".tmp")
        aside.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in (header, *self.done.values())))
        os.replace(aside, self._path)
        sync_folder(self.folder)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(orjson.loads(text))
        except ValueError:
            break  # cut off in the middle of a line; nothing after it counts
    return lines


def _is_there(folder: Path, line: dict[str, Any]) -> bool:
    path = folder / line["file"]
    is_whole: bool = path.is_file() and path.stat().st_size == int(line["size"])
    return is_whole
