"""Injection of faults: flipped bits, cut files, full disks, and a kill at one exact file operation."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_cpt.checkpoint.manifest import FileDigest, digest, manifest_text, read_manifest

# Audit events of Python for changes of files: event -> positions of (path, dir_fd) in its arguments.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),  # os.replace as well
    "os.remove": ((0, 1),),  # os.unlink
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.truncate": ((0, None),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file; `bit` counts from the start of the file and wraps around at its end."""
    byte, inside = divmod(bit % (8 * path.stat().st_size), 8)
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << inside)]))


def cut(path: Path, size: int) -> None:
    """Shorten a file to `size` bytes."""
    assert size < path.stat().st_size
    os.truncate(path, size)


def seal_again(checkpoint: Path) -> None:
    """Write a manifest that matches the current files, as an attacker would."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(manifest_text({name: digest(checkpoint / name) for name in names}))


def change_manifest(checkpoint: Path, change: Callable[[dict[str, FileDigest]], object]) -> None:
    """Write a manifest with other entries, as an attacker would: its own checksum is right."""
    files = read_manifest(checkpoint)
    change(files)
    (checkpoint / "manifest.json").write_text(manifest_text(files))


def limit_file_size(size: int) -> None:
    """Make every write of this process beyond `size` bytes of a file fail, like a write to a full disk.

    The error is EFBIG instead of a full disk's ENOSPC; Python ignores the signal SIGXFSZ.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Death:
    """Kills this process and its forks just before their n-th change of the files below a folder.

    Changes are the audit events of Python (create, open for writing, rename, delete, make and remove folders) and calls
    of `os.fsync`. The count is in shared memory, so it includes the changes of forked processes.
    """

    def __init__(self, folder: Path, number: int | None, journal: Path, *, power_cut: bool = False) -> None:
        """Start counting.

        Args:
            folder: only changes below it count.
            number: die before this change, counted from 1; None: only count.
            journal: a file outside of the folder that gets one line per change; its last line is the change that the
                kill prevented.
            power_cut: also cut every file in half that was written but not synced, as if only synced data had reached
                the disk.
        """
        self._root = str(folder.resolve())
        self._number = number
        self._power_cut = power_cut
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._count: Any = multiprocessing.get_context("fork").Value("i", 0)
        self._synced: Any = os.memfd_create("synced")  # shared with forked writers
        self._is_dying = False
        for path in _files(self._root):
            self._remember(os.stat(path))
        os.setpgid(0, 0)
        fsync = os.fsync

        def counted_fsync(fd: Any) -> None:
            fd = fd if isinstance(fd, int) else fd.fileno()
            self._see("fsync", os.readlink(f"/proc/self/fd/{fd}"))
            fsync(fd)
            self._remember(os.fstat(fd))

        os.fsync = counted_fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        places = _CHANGES.get(event)
        if places is None or self._is_dying or (event == "open" and not (args[2] or 0) & _WRITES):
            return
        for path_at, fd_at in places:
            if isinstance(args[path_at], str | bytes | os.PathLike):
                self._see(event, _absolute(args[path_at], args[fd_at] if fd_at is not None else -1))
                return

    def _see(self, what: str, path: str) -> None:
        if not path.startswith(self._root):
            return
        with self._count.get_lock():
            self._count.value += 1
            os.write(self._journal, f"{what} {os.path.relpath(path, self._root)}\n".encode())
            if self._count.value == self._number:
                self._die()

    def _remember(self, stat: os.stat_result) -> None:
        with self._count.get_lock():  # the kernel does not lock the position of a memfd
            os.write(self._synced, f"{stat.st_ino} {stat.st_mtime_ns}\n".encode())

    def _die(self) -> NoReturn:
        self._is_dying = True
        if self._power_cut:
            synced = set(os.pread(self._synced, 1 << 24, 0).decode().splitlines())
            for path in _files(self._root):
                stat = os.stat(path)
                if f"{stat.st_ino} {stat.st_mtime_ns}" not in synced:
                    os.truncate(path, stat.st_size // 2)
        os.killpg(0, signal.SIGKILL)
        raise AssertionError("a process does not survive SIGKILL")


class FailingDisk:
    """Makes one change of the files below a folder fail: an open for writing, a rename, a deletion, an fsync.

    Attributes:
        changes: number of changes in the last `fails_at` block.
    """

    def __init__(self, folder: Path) -> None:
        self._root, self._at, self._error = str(folder.resolve()), -1, 0
        self._is_active = False
        self.changes = 0
        sys.addaudithook(self._hook)  # stays for the life of the process, inactive outside of `fails_at`

    @contextlib.contextmanager
    def fails_at(self, change: int | None, error: int = errno.EIO) -> Iterator[None]:
        """Fail before a change, counted from 0, with an error number; None: only count."""
        fsync = os.fsync

        def failing_fsync(fd: Any) -> None:
            self._see(os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}"))
            fsync(fd)

        self._at, self._error, self.changes = -1 if change is None else change, error, 0
        self._is_active, os.fsync = True, failing_fsync
        try:
            yield
        finally:
            self._is_active, os.fsync = False, fsync

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_active or event not in _CHANGES or (event == "open" and not (args[2] or 0) & _WRITES):
            return
        path_at, fd_at = _CHANGES[event][0]
        if isinstance(args[path_at], str | bytes | os.PathLike):
            self._see(_absolute(args[path_at], args[fd_at] if fd_at is not None else -1))

    def _see(self, path: str) -> None:
        if path.startswith(self._root):
            self.changes += 1
            if self.changes - 1 == self._at:
                raise OSError(self._error, os.strerror(self._error), path)


def _files(root: str) -> list[str]:
    return [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]


def _absolute(path: Any, folder_fd: int) -> str:
    path = os.fsdecode(path)
    if not os.path.isabs(path) and folder_fd >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder_fd}"), path)
    return os.path.abspath(path)
