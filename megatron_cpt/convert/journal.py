"""What of a conversion is done: a line each time, on the disk before the work goes on.

A conversion that was killed goes on where it was. What it had not finished is written anew; what it had finished is
kept only if the job is the same: the same source files, unchanged, and the same options.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.files.atomic import write_atomically

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The journal of one work folder; calls may come from several threads.

    Attributes:
        folder: the work folder.
        lines: what was recorded, by earlier calls and this one.
    """

    def __init__(self, folder: Path, job: Any) -> None:
        """Open a work folder: go on in it if it belongs to this job, else empty it.

        Args:
            folder: where the result is written aside.
            job: what decides the result, as plain values.
        """
        self.folder = folder
        self._lock = threading.Lock()
        self._path = folder / JOURNAL_FILE
        self._job = hashlib.sha256(orjson.dumps(job)).hexdigest()
        found = _read_lines(self._path)
        self.lines = found[1:]
        if found[:1] == [self._job]:
            self._rewrite()
        else:
            self.restart()

    def restart(self) -> None:
        """Empty the work folder and begin anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.lines = []
        self._rewrite()

    def record(self, line: Any) -> None:
        """Something is complete and on the disk."""
        text = orjson.dumps(line)
        with self._lock, open(self._path, "ab") as journal:
            journal.write(text + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
            self.lines.append(orjson.loads(text))

    def remove(self) -> None:
        """The work is done: the journal goes before the result is published."""
        self._path.unlink()

    def _rewrite(self) -> None:
        """Without a line that a power cut left half written."""
        write_atomically(self._path, b"".join(orjson.dumps(line) + b"\n" for line in (self._job, *self.lines)))


def _read_lines(path: Path) -> list[Any]:
    lines: list[Any] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(orjson.loads(text))
        except ValueError:
            break  # cut off in the middle of a line; nothing after it counts
    return lines
