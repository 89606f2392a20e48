"""Files of JSON lines that a run appends to: they hold whole lines, whatever the disk does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import CptError
from megatron_cpt.files.atomic import write_atomically


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block, an error of the disk says which file it is about.

    Raises:
        CptError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CptError(
            f"{path}: cannot be written: {error.strerror or error}; make room or mend the disk, and start the run again"
        ) from error


class JsonlLog:
    """A file that lines are appended to. One process at a time may have it open.

    Raises:
        CptError: the file cannot be opened, here, or written, in the methods.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close

    def append(self, line: dict[str, Any]) -> None:
        """Append a line, or leave the file as it was."""
        content = orjson.dumps(line) + b"\n"
        with naming(self._path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                while content:  # a disk that fills up takes a part of it first
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(size)
                raise

    def close(self) -> None:
        """Make all lines durable and close the file."""
        with naming(self._path), self._file:
            os.fsync(self._file.fileno())


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to a step; what a kill left of a line at the end goes too.

    Raises:
        CptError: the file cannot be written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):
            continue  # the line that a crash cut
    with naming(path):
        write_atomically(path, "".join(line + "\n" for line in kept))
