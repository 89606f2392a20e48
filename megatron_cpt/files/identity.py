"""Identity of input files, to find a file that is no longer the one that a command started to read.

Half of an old and half of a new file, or the beginning of a file that was cut, look like valid input. So a command
notes inode, size and modification time of each file when it opens it, and compares them before it publishes its result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from megatron_cpt.errors import CptError, RefusedError
from megatron_cpt.files.retry import retry_disk
from megatron_cpt.files.whole_io import exists, read_file

_MOUNTS = "/proc/self/mountinfo"


class ChangedFileError(RefusedError):
    """Input file that changed while a command read it."""

    def __init__(self, path: str, change: str) -> None:
        super().__init__(
            f"{path}: {change} since it was opened: what was read may be a mixture of two versions and is not used; "
            "wait until nobody writes the file, then run the command again"
        )


class FileIdentity(NamedTuple):
    """Identity of a local file. It does not include the device number, which differs between mounts of one server.

    Attributes:
        mtime_ns: modification time in nanoseconds.
    """

    path: str
    inode: int
    num_bytes: int
    mtime_ns: int

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """Return the identity of the file that has a name now."""
        return cls.of(os.fspath(path), retry_disk(path, lambda: os.stat(path)))

    @classmethod
    def of(cls, path: str, stat: os.stat_result) -> FileIdentity:
        """Return the identity of a file with this status."""
        return cls(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Compare with the file that has the name now.

        Raises:
            ChangedFileError: they differ, or no file has the name any more.
        """
        try:
            stat = retry_disk(self.path, lambda: os.stat(self.path))
        except FileNotFoundError:
            raise ChangedFileError(self.path, "was removed") from None
        self.compare(stat)

    def compare(self, stat: os.stat_result) -> None:
        """Compare with a file of this status, such as one that was opened again.

        Raises:
            ChangedFileError: they differ.
        """
        if stat.st_size != self.num_bytes:
            change = "truncated" if stat.st_size < self.num_bytes else "changed"
            raise ChangedFileError(self.path, f"was {change} from {self.num_bytes} to {stat.st_size} bytes")
        if stat.st_mtime_ns != self.mtime_ns:
            raise ChangedFileError(self.path, "was written to")
        if stat.st_ino != self.inode and _has_lasting_inodes(stat.st_dev):
            raise ChangedFileError(self.path, "was replaced by another file")


def identify(paths: Iterable[str | os.PathLike[str]]) -> list[FileIdentity]:
    """Return the identities of files."""
    return [FileIdentity.read(path) for path in paths]


def check_unchanged(identities: Iterable[FileIdentity]) -> None:
    """Raise a ChangedFileError for the first file that is no longer the one that was identified."""
    for identity in identities:
        identity.check()


@contextlib.contextmanager
def must_not_change(identities: Iterable[FileIdentity]) -> Iterator[None]:
    """Compare files at the end of the block, and also after an error: a file that was cut a moment ago looks corrupt.

    Raises:
        ChangedFileError: a file is no longer the one that was identified.
    """
    identities = list(identities)
    try:
        yield
    except CptError:
        check_unchanged(identities)
        raise
    check_unchanged(identities)


@cache
def _has_lasting_inodes(device: int) -> bool:
    """Return False for FUSE (such as gcsfuse), which gives a file another inode number once it has forgotten it."""
    name = f"{os.major(device)}:{os.minor(device)}"
    mounts = read_file(_MOUNTS).decode(errors="replace") if exists(_MOUNTS) else ""
    # Example of a line: 36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw
    lines = [line.partition(" - ") for line in mounts.splitlines()]
    return not any(left.split()[2] == name and right.startswith("fuse") for left, _, right in lines)
