"""Answers of finished requests in an SQLite file: an interrupted evaluation resumes, and a repeated one only reads.

A request is identified by everything that its answer depends on: the weights, the number format and the token ids of
the prompt. The ids contain the task's text and its few-shot examples, so an edited task file or another few-shot seed
makes other requests, while a larger `--limit` adds some.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import CptError, UserError

_APPLICATION_ID = 0x6D637074  # "mcpt", in the header of the file
_FORMAT_VERSION = 1
_LOCK_SECONDS = 120.0  # another process holds the lock for one batch at most
_CREATE = "CREATE TABLE IF NOT EXISTS answers (request BLOB PRIMARY KEY, answer BLOB, checksum INTEGER) WITHOUT ROWID"


def request_key(scope: str, kind: str, request: Any) -> bytes:
    """Return the key of a request.

    Args:
        scope: digest of the weights, and everything else that is equal for all requests of an evaluation.
        kind: method of the model, such as `loglikelihood`.
        request: plain values: token ids and options.
    """
    return hashlib.sha256(orjson.dumps([scope, kind, request], option=orjson.OPT_SORT_KEYS)).digest()


class FinishedRequests:
    """SQLite file with the answers of one or several evaluations; several processes may use it at the same time.

    Raises:
        UserError: the file is damaged or belongs to another program.
        CptError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors_as_cpt_errors():
            self._database = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            with self._transaction():
                self._open()
        except CptError:
            self._database.close()
            raise

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the answers that the file has, by key; an answer whose checksum differs counts as missing."""
        found = {}
        with self._errors_as_cpt_errors():
            for key in keys:
                row = self._database.execute(
                    "SELECT answer, checksum FROM answers WHERE request = ?", (key,)
                ).fetchone()
                if row is not None and isinstance(row[0], bytes) and _checksum(key, row[0]) == row[1]:
                    found[key] = orjson.loads(row[0])
        return found

    def add(self, answers: Mapping[bytes, Any]) -> None:
        """Write answers; they survive a kill of the process as soon as this call returns."""
        rows = [(key, orjson.dumps(answer)) for key, answer in answers.items()]
        with self._transaction():
            self._database.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", [(*row, _checksum(*row)) for row in rows]
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _open(self) -> None:
        owner, version, tables = (
            self._database.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema")
        )
        if tables and owner != _APPLICATION_ID:
            raise UserError(f"{self._path}: an SQLite file of another program; choose another file with --cache")
        if tables and version != _FORMAT_VERSION:
            raise UserError(
                f"{self._path}: finished requests of format {version}, this software reads {_FORMAT_VERSION}; choose "
                "another file with --cache"
            )
        self._database.execute(_CREATE)
        self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._database.execute(f"PRAGMA user_version = {_FORMAT_VERSION}")
        fault = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise sqlite3.DatabaseError(fault)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors_as_cpt_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    @contextmanager
    def _errors_as_cpt_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise CptError(
                f"{self._path}: finished requests cannot be kept ({error}); free some space, end other evaluations "
                "that use the file, or choose another file with --cache"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self._path}: not a file of finished requests, or damaged ({error}); delete it, or choose another "
                "file with --cache"
            ) from error


def _checksum(key: bytes, answer: bytes) -> int:
    return zlib.crc32(key + answer)
