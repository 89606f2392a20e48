"""Answers of finished requests in an SQLite file: an interrupted evaluation resumes, and a repeated one only reads.

A request is identified by everything that its answer depends on: the weights, the number format and the token ids of
the prompt. The ids contain the task's text and its few-shot examples, so an edited task file or another few-shot seed
makes other requests, while a larger `--limit` adds some.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson

from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.whole_io import DiskFile

T = TypeVar("T")

_APPLICATION_ID = 0x6D637074  # "mcpt", in the header of the file
_FORMAT_VERSION = 1
_CHUNK_BYTES = 4 << 20
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
        CptError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        try:
            self._request(lambda database: None)
        except BaseException:
            self.close()
            raise

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the answers that the file has, by key; an answer whose checksum differs counts as missing."""

        def answers(database: sqlite3.Connection) -> dict[bytes, Any]:
            found = {}
            for key in keys:
                row = database.execute("SELECT answer, checksum FROM answers WHERE request = ?", (key,)).fetchone()
                if row is None or not isinstance(row[0], bytes) or _checksum(key, row[0]) != row[1]:
                    continue
                if not row[0].startswith((b"null", b"[null")):  # earlier versions kept NaN, which JSON lacks
                    found[key] = orjson.loads(row[0])
            return found

        return self._request(answers)

    def add(self, answers: Mapping[bytes, Any]) -> None:
        """Write answers; they survive a kill of the process as soon as this call returns."""
        contents = [(key, orjson.dumps(answer)) for key, answer in answers.items()]
        rows = [(key, content, _checksum(key, content)) for key, content in contents]

        def insert(database: sqlite3.Connection) -> None:
            with _transaction(database):
                database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

        self._request(insert)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _request(self, request: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of a request; repeat it once if it may have failed because the disk could not be read.

        SQLite reports such a failure as an error of the disk or as damage, depending on the page. Reading the whole
        file waits for a disk that fails for a moment, and raises if it never answers. So only what SQLite refuses
        while every byte can be read counts as damage.
        """
        with self._errors_as_cpt_errors():
            try:
                return request(self._opened())
            except sqlite3.DatabaseError as error:
                if not _may_be_unreadable(error):
                    raise
            self.close()  # first: closing another descriptor of the file would drop SQLite's locks
            with DiskFile(self._path) as file:
                while file.read(_CHUNK_BYTES):
                    pass
            return request(self._opened())

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            path = self._path.absolute()  # `:memory:` alone would be no file
            self._database = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
            with _transaction(self._database):
                self._check_or_create(self._database)
        return self._database

    def _check_or_create(self, database: sqlite3.Connection) -> None:
        owner, version, tables = (
            database.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema")
        )
        if tables and owner != _APPLICATION_ID:
            raise UserError(f"{self._path}: an SQLite file of another program; choose another file with --cache")
        if tables and version != _FORMAT_VERSION:
            raise UserError(
                f"{self._path}: finished requests of format {version}, this software reads {_FORMAT_VERSION}; choose "
                "another file with --cache"
            )
        database.execute(_CREATE)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {_FORMAT_VERSION}")
        fault = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise sqlite3.DatabaseError(" ".join(fault.split()))

    @contextmanager
    def _errors_as_cpt_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", None)  # missing where Python itself raises it
            if code == sqlite3.SQLITE_READONLY_DBMOVED:
                raise CptError(
                    f"{self._path}: finished requests cannot be kept: the file was moved or deleted meanwhile; run the "
                    "same command again"
                ) from error
            if isinstance(error, sqlite3.OperationalError) and code not in (None, sqlite3.SQLITE_ERROR):
                raise CptError(
                    f"{self._path}: finished requests cannot be kept ({error}); free some space, end other "
                    "evaluations that use the file, or choose another file with --cache"
                ) from error
            # SQLITE_ERROR: no such table, or no such column
            raise UserError(
                f"{self._path}: not a file of finished requests, or damaged ({error}); delete it, or choose another "
                "file with --cache"
            ) from error
        except OSError as error:
            raise CptError(
                f"{self._path}: finished requests cannot be read ({error.strerror}); check the disk, or choose another "
                "file with --cache"
            ) from error


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _may_be_unreadable(error: sqlite3.DatabaseError) -> bool:
    if not isinstance(error, sqlite3.OperationalError):
        return True  # "malformed" is also the message when the page with the tables cannot be read
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_IOERR  # https://sqlite.org/rescode.html


def _checksum(key: bytes, answer: bytes) -> int:
    return zlib.crc32(key + answer)
