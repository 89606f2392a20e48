"""JSONL files that a run appends to; they hold only whole lines, even on a disk that fills up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import CptError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import DiskFile, exists, read_file


@contextlib.contextmanager
def write_errors_as_cpt_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised in the block into a CptError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise CptError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or check the disk, then run again"
        ) from error


class JsonlLog:
    """JSONL file opened for appending, by one process at a time.

    Raises:
        CptError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with write_errors_as_cpt_errors(path):
            self._file = DiskFile(path, "ab")

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; on an error the file keeps its earlier content."""
        content = orjson.dumps(line) + b"\n"
        with write_errors_as_cpt_errors(self._path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                self._file.write(content)
            except OSError:  # a disk that is nearly full may have taken a part of the line
                self._file.truncate(size)
                raise

    def close(self) -> None:
        """Make all lines durable and close the file."""
        with write_errors_as_cpt_errors(self._path), self._file:
            self._file.sync()


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that a kill cut short.

    Raises:
        CptError: the file cannot be written.
    """
    if not exists(path):
        return
    kept = []
    for line in read_file(path).splitlines():
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with write_errors_as_cpt_errors(path):
        write_atomically(path, b"".join(line + b"\n" for line in kept))
