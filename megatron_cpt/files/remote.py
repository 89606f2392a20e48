"""Read ranges of files on a local disk or on anything that fsspec opens (`s3://bucket/web`, `gs://...`, `memory://...`).

A `.bin`/`.idx` reader needs the size of a file and ranges of its bytes, so that is the whole interface; no file is
downloaded as a whole. A path with `://` in it is remote. fsspec is imported when the first remote path is opened, and
finds credentials in its usual places. Requests to a store that fail are retried with growing delays.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from megatron_cpt.errors import CptError, UserError, install_command
from megatron_cpt.files.retry import retry
from megatron_cpt.files.whole_io import DiskRanges, is_regular_file

T = TypeVar("T")

RETRY_DELAYS: tuple[float, ...] = (2, 4, 8, 16)
"""Mean seconds before each further attempt: 5 attempts over about 30 seconds."""

_SCHEME = "://"
_LASTING_ERRORS = (  # a further attempt would fail in the same way
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
    CptError,
)


class RangeFile(Protocol):
    """File opened for reading ranges of it; used in a `with` block."""

    @property
    def size(self) -> int:
        """Present size in bytes."""

    def read(self, offset: int, count: int) -> bytes:
        """Return the bytes [offset, offset + count), fewer at the end of the file."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset` on; return the number of bytes, fewer only at the end of the file."""

    def will_read(self, offset: int, count: int) -> None:
        """Announce a read: a local disk starts to fetch the bytes in the background."""

    def __enter__(self) -> RangeFile: ...

    def __exit__(self, *error: object) -> None: ...


def is_remote(path: str) -> bool:
    """Return whether fsspec has to open a path."""
    return _SCHEME in path


def open_ranges(path: str) -> RangeFile:
    """Open a file.

    Raises:
        OSError: the file is missing or not readable; for a remote file the first read may raise it instead.
        UserError: the package that opens a remote path is not installed.
        CptError: from a read of a remote file: the store failed at every attempt.
    """
    return _RemoteFile(path) if is_remote(path) else DiskRanges(path)


def is_file(path: str) -> bool:
    """Return whether a file exists."""
    if not is_remote(path):
        return is_regular_file(path)
    return bool(_with_retries(path, lambda: _file_system(path).isfile(path)))


def find(pattern: str) -> list[str]:
    """Return the paths that match a glob, in any order."""
    if not is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    file_system = _file_system(pattern)
    return [file_system.unstrip_protocol(path) for path in _with_retries(pattern, lambda: file_system.glob(pattern))]


class _RemoteFile:
    """One request per range; no connection is held open."""

    def __init__(self, path: str) -> None:
        self._path, self._files = path, _file_system(path)

    @property
    def size(self) -> int:
        return _with_retries(self._path, lambda: int(self._files.size(self._path)))

    def read(self, offset: int, count: int) -> bytes:
        # Object stores refuse a range that begins at the end or beyond it, so ask for the size first.
        end = min(offset + count, self.size)
        return self._range(offset, end) if offset < end else b""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._range(offset, offset + len(buffer))  # no request for the size: callers know where the file ends
        buffer[: len(data)] = data
        return len(data)

    def will_read(self, offset: int, count: int) -> None:
        """Do nothing: bytes fetched ahead would have to be kept somewhere."""

    def _range(self, start: int, end: int) -> bytes:
        return _with_retries(self._path, lambda: bytes(self._files.cat_file(self._path, start=start, end=end)))

    def __enter__(self) -> _RemoteFile:
        return self

    def __exit__(self, *_: object) -> None: ...


def _with_retries(path: str, request: Callable[[], T]) -> T:
    """Return the result of a request; retry it when it fails, after `RETRY_DELAYS`."""

    def is_passing(error: Exception) -> bool:  # every store has exceptions of its own
        return not isinstance(error, _LASTING_ERRORS)

    try:
        return retry(path, request, is_passing, RETRY_DELAYS)
    except Exception as error:
        if not is_passing(error):
            raise
        raise CptError(
            f"{path}: cannot be read, {len(RETRY_DELAYS) + 1} attempts failed ({type(error).__name__}: {error}); check "
            "the store and the network, then run the command again"
        ) from error


def _file_system(path: str) -> Any:
    protocol = path.partition(_SCHEME)[0]
    try:
        import fsspec

        return fsspec.filesystem(protocol)  # fsspec returns the same object each time
    except (ImportError, ValueError) as error:  # ValueError: a protocol that fsspec does not know
        raise UserError(
            f"{path}: {protocol}:// cannot be opened: {error}; {install_command('cloud')} and the package that "
            f"fsspec opens {protocol}:// with (s3fs, gcsfs, adlfs), or copy the files to a local disk"
        ) from error
