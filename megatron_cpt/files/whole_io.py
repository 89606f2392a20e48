"""Files that are read and written as a whole: no short read or write, retried reads, errors that name the file.

The operating system may transfer fewer bytes than a call asks for: at a signal, on network file systems, and always
beyond 2 GiB. `DiskFile` repeats the call until the range is complete or the file ends. All code of the package reads
and writes through it; `tests/unit/files/test_whole_io.py` finds other calls.

A failed read is repeated (see `retry_disk`). A failed write or fsync is not: after an error the kernel may have dropped
the data, and a second fsync would report success. The command ends, publishes nothing, and its next call writes again.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from megatron_cpt.files.retry import is_path_error, name_file_in_errors, retry_disk

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")

FilePath = str | os.PathLike[str]
_Identity = tuple[int, int, int, int]

BUFFER_BYTES = 1 << 16
_COPY_BYTES = 1 << 20
_RANGES_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # without O_NONBLOCK the open of a pipe would wait
_MOST_BYTES = 1 << 30  # per system call; Linux transfers at most 2 GiB


class DiskFile(io.FileIO):
    """Unbuffered file in which every call transfers everything; errors carry the name of the file.

    The positional methods need no lock between threads. After ESTALE (the file server no longer knows the handle) a
    file opened for reading is opened again, and must be the same file.

    Args:
        path: the file.
        mode: as for `open`.
        flags: more flags for the system call, such as `os.O_NOFOLLOW`.
    """

    def __init__(self, path: FilePath, mode: str = "rb", *, flags: int = 0) -> None:
        self._path, self._is_stale = os.fspath(path), False
        open_file = super().__init__

        def opener(path: str, usual_flags: int) -> int:
            return os.open(path, usual_flags | flags, 0o666)

        retry_disk(path, lambda: open_file(self._path, mode, opener=opener if flags else None))
        self._identity = _identify(self.fileno())

    @property
    def size(self) -> int:
        """Present size in bytes."""
        return os.fstat(self.fileno()).st_size

    def read_at(self, offset: int, count: int) -> bytes:
        """Return the bytes [offset, offset + count), fewer only at the end of the file."""

        def read(done: int) -> bytes:
            return os.pread(self.fileno(), min(count - done, _MOST_BYTES), offset + done)

        return self._read_all(read, count)

    def read_into_at(self, buffer: Any, offset: int) -> int:
        """Fill a buffer with the bytes from `offset` on; return their number, fewer only at the end of the file."""
        return self._fill(lambda view, done: os.preadv(self.fileno(), [view], offset + done), buffer)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position; return the number of bytes, fewer only at the end of the file."""
        read = super().readinto
        return self._fill(lambda view, _: read(view) or 0, buffer)

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file; by default all that follow."""
        if size is None or size < 0:
            return self.readall()
        read = super().read
        return self._read_all(lambda done: read(min(size - done, _MOST_BYTES)) or b"", size)

    def readall(self) -> bytes:
        """Return all bytes from the current position on."""
        position, read = self.tell(), super().readall

        def read_from_position() -> bytes:
            self.seek(position)  # a failed attempt may have read a part
            return read() or b""

        return self._retry(read_from_position)

    def write(self, data: Any) -> int:
        """Write all bytes at the current position, and return their number."""
        write = super().write
        return self._write_all(lambda view, _: write(view) or 0, data)

    def write_at(self, data: Any, offset: int) -> None:
        """Write all bytes at `offset`."""
        self._write_all(lambda view, done: os.pwrite(self.fileno(), view, offset + done), data)

    def truncate(self, size: int | None = None) -> int:
        """Set the size in bytes, by default to the current position, and return it."""
        with name_file_in_errors(self._path):
            return super().truncate(size)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with name_file_in_errors(self._path):
            os.fsync(self.fileno())

    def _read_all(self, read: Callable[[int], bytes], count: int) -> bytes:
        data = self._retry(read, 0)
        pieces, done = [data], len(data)
        while data and done < count:
            data = self._retry(read, done)
            pieces.append(data)
            done += len(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fill(self, read: Callable[[memoryview, int], int], buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and (count := self._retry(read, view[done : done + _MOST_BYTES], done)):
            done += count
        return done

    def _write_all(self, write: Callable[[memoryview, int], int], data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        with name_file_in_errors(self._path):
            while done < len(view):
                done += write(view[done : done + _MOST_BYTES], done)
        return done

    def _retry(self, request: Callable[..., T], *arguments: Any) -> T:
        try:
            return request(*arguments)
        except OSError as error:
            self._is_stale = _is_stale(error)
            return self._retry_after(error, request, arguments)

    def _retry_after(self, first: OSError, request: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        def attempt() -> T:
            try:
                if self._is_stale and not self.writable():
                    self._open_again()
                return request(*arguments)
            except OSError as error:
                self._is_stale = _is_stale(error)
                raise

        return retry_disk(self._path, attempt, first)

    def _open_again(self) -> None:
        position = self.tell()
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _require_same(_identify(fd), self._identity, self._path)
            os.dup2(fd, self.fileno(), inheritable=False)
        finally:
            os.close(fd)
        self.seek(position)


class DiskRanges:
    """Ranges of a file that is read often: like `DiskFile`, with less work per opening and per read.

    A loader opens a file per micro-batch, so that ten thousand files need no descriptors; each microsecond counts.

    Raises:
        OSError: the file is missing, not readable, or not a regular file, such as a folder or a pipe.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = retry_disk(path, lambda: os.open(path, _RANGES_FLAGS))
        except ValueError as error:  # a NUL, or a character that no name of a file has
            raise FileNotFoundError(errno.ENOENT, str(error), path) from None
        self._stat = os.fstat(self._fd)
        if not stat.S_ISREG(self._stat.st_mode):
            os.close(self._fd)
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path)

    @property
    def size(self) -> int:
        """Present size in bytes."""
        return os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Return the bytes [offset, offset + count), fewer only at the end of the file."""
        try:
            data = os.pread(self._fd, count, offset)
        except OSError as error:
            return self._read_slowly(lambda file: file.read_at(offset, count), error)
        if len(data) == count or not data or offset + len(data) == self._stat.st_size:
            return data
        return data + self._read_slowly(lambda file: file.read_at(offset + len(data), count - len(data)))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset` on; return the number of bytes, fewer only at the end of the file."""
        try:
            done = os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            return self._read_slowly(lambda file: file.read_into_at(buffer, offset), error)
        if done == len(buffer) or not done:
            return done
        return done + self._read_slowly(lambda file: file.read_into_at(buffer[done:], offset + done))

    def will_read(self, offset: int, count: int) -> None:
        """Announce a read: the disk starts to fetch the bytes in the background."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_WILLNEED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _read_slowly(self, read: Callable[[DiskFile], T], first: OSError | None = None) -> T:
        def read_again() -> T:
            with DiskFile(self._path) as file:
                _require_same(_identify(file.fileno()), _identity_of(self._stat), self._path)
                return read(file)

        return retry_disk(self._path, read_again, first)


def _is_stale(error: OSError) -> bool:
    return error.errno == errno.ESTALE


def _identify(fd: int) -> _Identity:
    return _identity_of(os.fstat(fd))


def _identity_of(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _require_same(found: _Identity, first: _Identity, path: str) -> None:
    if found != first:
        raise OSError(errno.ESTALE, "was replaced by another file while it was read", path)


def open_reader(path: FilePath, buffer_bytes: int = BUFFER_BYTES) -> io.BufferedReader:
    """Open a file for buffered reading."""
    return io.BufferedReader(DiskFile(path), buffer_bytes)


def open_writer(path: FilePath, mode: str = "wb", buffer_bytes: int = BUFFER_BYTES) -> io.BufferedWriter:
    """Open a file for buffered writing."""
    return io.BufferedWriter(DiskFile(path, mode), buffer_bytes)


def read_file(path: FilePath) -> bytes:
    """Return the content of a file."""
    with DiskFile(path) as file:
        return file.readall()


def read_text(path: FilePath, encoding: str = "utf-8", *, errors: str = "strict") -> str:
    """Return the text in a file, with `\\n` at the end of every line."""
    text = read_file(path).decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_array(path: FilePath, dtype: npt.DTypeLike, count: int, offset: int = 0) -> npt.NDArray[Any]:
    """Return `count` numbers from byte `offset` of a file on, fewer only at its end."""
    import numpy as np  # here: a command that reads no data starts without it

    array = np.empty(count, dtype)
    if count:
        with DiskFile(path) as file:
            array = array[: file.read_into_at(array, offset) // array.itemsize]
    return array


def read_whole_array(path: FilePath, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the numbers that a file consists of."""
    import numpy as np

    return np.frombuffer(read_file(path), dtype)


def write_content(path: FilePath, data: bytes) -> None:
    """Write the content of a file; `write_atomically` also survives a power cut."""
    with DiskFile(path, "wb") as file:
        file.write(data)


def copy_file(source: FilePath, target: FilePath) -> None:
    """Copy the content of a file."""
    with DiskFile(source) as reader, DiskFile(target, "wb") as writer:
        while piece := reader.read(_COPY_BYTES):
            writer.write(piece)


def exists(path: FilePath) -> bool:
    """Return whether a path exists; `os.path.exists` would return False when the disk fails."""
    return _mode(path) != 0


def is_regular_file(path: FilePath) -> bool:
    """Return whether a regular file exists."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: FilePath) -> bool:
    """Return whether a folder exists."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: FilePath) -> int:
    """Return the type and permissions of a path, 0 if nothing exists there."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        first = error
    except ValueError:  # a NUL in the path
        return 0
    try:
        if not is_path_error(first):
            return retry_disk(path, lambda: os.stat(path), first).st_mode
    except OSError as error:
        if not is_path_error(error):
            raise
    return 0
