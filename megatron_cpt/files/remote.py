"""Where token files lie: a local disk, or anything that fsspec opens (`s3://bucket/web`, `gs://...`, `memory://...`).

All that reading a `.bin`/`.idx` takes is its size and ranges of its bytes, so that is the whole interface; nothing is
downloaded or cached as a whole. A path with `://` in it is remote; fsspec is loaded when the first one is opened, and
finds credentials where it always does.
"""

from __future__ import annotations

import glob
import os
from types import TracebackType
from typing import Any, Protocol

from megatron_cpt.errors import UserError

_SCHEME = "://"


class RangeFile(Protocol):
    """A file opened for reading ranges of it; used in a `with` block."""

    @property
    def size(self) -> int:
        """Its bytes, now."""

    def read(self, offset: int, count: int) -> bytes:
        """Bytes [offset, offset + count), fewer where the file ends."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the front of a buffer from `offset`; how many bytes were there, at least 1 unless the file ends."""

    def will_read(self, offset: int, count: int) -> None:
        """Says that these bytes are read soon: a local disk begins to fetch them, and nobody waits."""

    def __enter__(self) -> RangeFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def is_remote(path: str) -> bool:
    """Whether a path is not of the local file system."""
    return _SCHEME in path


def open_ranges(path: str) -> RangeFile:
    """Open a file.

    Raises:
        OSError: it is not there or may not be read; of a remote file that may also be found with the first read.
        UserError: a remote path, but what opens it is not installed.
    """
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


def is_file(path: str) -> bool:
    """Whether there is such a file."""
    return bool(_file_system(path).isfile(path)) if is_remote(path) else os.path.isfile(path)


def find(pattern: str) -> list[str]:
    """Paths that match a glob, in no order."""
    if not is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    file_system = _file_system(pattern)
    return [file_system.unstrip_protocol(path) for path in file_system.glob(pattern)]


class _LocalFile:
    """`pread` on a descriptor: no position to share, no lock held while the disk works."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def will_read(self, offset: int, count: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def __enter__(self) -> _LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


class _RemoteFile:
    """One request a range; nothing is held open."""

    def __init__(self, path: str) -> None:
        self._path, self._files = path, _file_system(path)

    @property
    def size(self) -> int:
        return int(self._files.size(self._path))

    def read(self, offset: int, count: int) -> bytes:
        # object stores refuse a range that begins at or beyond the end, so the end is asked for first
        end = min(offset + count, self.size)
        return self._range(offset, end) if offset < end else b""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._range(offset, offset + len(buffer))  # samples: whoever reads them knows where the file ends
        buffer[: len(data)] = data
        return len(data)

    def will_read(self, offset: int, count: int) -> None:
        """Nothing can be asked for ahead without keeping it."""

    def _range(self, start: int, end: int) -> bytes:
        return bytes(self._files.cat_file(self._path, start=start, end=end))

    def __enter__(self) -> _RemoteFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _file_system(path: str) -> Any:
    protocol = path.partition(_SCHEME)[0]
    try:
        import fsspec

        return fsspec.filesystem(protocol)  # kept by fsspec: the same one each time
    except (ImportError, ValueError) as error:  # ValueError: a protocol that fsspec does not know
        raise UserError(
            f"{path}: {protocol}:// cannot be opened: {error}; pip install 'megatron-cpt[cloud]' and the package that "
            f"fsspec opens {protocol}:// with (s3fs, gcsfs, adlfs), or copy the files to a local disk"
        ) from error
