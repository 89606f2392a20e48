"""Whole reads and writes, retries of a failing disk, and that no other module reads or writes by itself."""

from __future__ import annotations

import ast
import errno
import logging
import os
from pathlib import Path

import pytest

import megatron_cpt
from megatron_cpt.files import retry, whole_io
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import (
    DiskFile,
    exists,
    is_folder,
    is_regular_file,
    open_reader,
    open_writer,
    read_file,
)

DATA = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


@pytest.fixture
def short(monkeypatch):
    """Make every positional call of the operating system transfer at most 7 bytes."""
    pread, preadv, pwrite = os.pread, os.preadv, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 7), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:7], offset))


@pytest.fixture
def sleeps(monkeypatch):
    """Record the waits instead of waiting."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def fail(monkeypatch, name, *errnos):
    """Make the next calls of a function of `os` raise these errors, one each."""
    real, left = getattr(os, name), list(errnos)

    def call(*arguments, **options):
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)
    return left


class TestWholeTransfers:
    @pytest.mark.parametrize("limit", [1 << 30, 100])
    def test_every_read_is_whole(self, path, short, monkeypatch, limit):
        monkeypatch.setattr(whole_io, "_MOST_BYTES", limit)
        with DiskFile(path) as file:
            assert file.read_at(3, 1000) == DATA[3:1003]
            assert file.read_at(len(DATA) - 5, 1000) == DATA[-5:]
            assert file.read_at(len(DATA) + 5, 1000) == b""
            buffer = bytearray(500)
            assert file.read_into_at(buffer, 9) == 500
            assert buffer == DATA[9:509]
            assert file.read_into_at(memoryview(buffer), len(DATA) - 4) == 4
            assert file.read(300) == DATA[:300]
            assert file.readinto(buffer) == 500
            assert buffer == DATA[300:800]
            assert file.read() == DATA[800:]
            assert (file.read(10), file.read(), file.readinto(buffer)) == (b"", b"", 0)

    def test_every_write_is_whole(self, tmp_path, short, monkeypatch):
        monkeypatch.setattr(whole_io, "_MOST_BYTES", 100)
        with DiskFile(tmp_path / "new", "wb") as file:
            assert file.write(DATA[:500]) == 500
            file.write_at(memoryview(DATA)[500:], 500)
            file.sync()
        with open_writer(tmp_path / "buffered", buffer_bytes=64) as file:
            for start in range(0, len(DATA), 50):
                file.write(DATA[start : start + 50])
        assert read_file(tmp_path / "new") == read_file(tmp_path / "buffered") == DATA

    def test_buffered_reading_and_files_of_the_kernel(self, path):
        with open_reader(path, 64) as file:
            assert (file.read(10), file.readline(), file.read()) == (DATA[:10], DATA[10:11], DATA[11:])
        assert b"VmRSS" in read_file("/proc/self/status")  # its size is 0


class TestFailingDisk:
    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
    def test_a_read_is_repeated_and_each_retry_is_logged_once(self, path, monkeypatch, sleeps, caplog, number):
        fail(monkeypatch, "pread", number, number)
        with caplog.at_level(logging.WARNING, retry.__name__), DiskFile(path) as file:
            assert file.read_at(5, 20) == DATA[5:25]
        messages = [record.getMessage() for record in caplog.records]
        assert [message.partition("; retrying")[0] for message in messages] == [
            f"{path}: attempt {attempt} of 5 failed ({os.strerror(number)})" for attempt in (1, 2)
        ]
        assert len(sleeps) == 2

    def test_a_disk_that_stays_broken_is_an_error_with_the_name_of_the_file(self, path, monkeypatch, sleeps):
        left = fail(monkeypatch, "preadv", *[errno.EIO] * 9)
        with DiskFile(path) as file, pytest.raises(OSError, match="Input/output error") as caught:
            file.read_into_at(bytearray(9), 0)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
        assert (len(left), len(sleeps)) == (4, 4)
        assert sum(sleeps) <= 1.5 * sum(retry.DISK_DELAYS)

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EMFILE])
    def test_other_errors_are_not_repeated(self, path, monkeypatch, sleeps, number):
        fail(monkeypatch, "pread", number)
        with DiskFile(path) as file, pytest.raises(OSError, match=str(path)):
            file.read_at(0, 1)
        assert not sleeps

    def test_a_stale_handle_is_opened_again_at_the_same_position(self, path, monkeypatch, sleeps):
        with DiskFile(path) as file:
            file.seek(40)
            fail(monkeypatch, "pread", errno.ESTALE)
            descriptor, inode = file.fileno(), os.fstat(file.fileno()).st_ino
            assert file.read_at(10, 20) == DATA[10:30]
            assert file.read(5) == DATA[40:45]
            assert (file.fileno(), os.fstat(file.fileno()).st_ino) == (descriptor, inode)

    def test_another_file_under_the_name_of_a_stale_one_is_not_read(self, path, monkeypatch, sleeps):
        with DiskFile(path) as file:
            (path.parent / "other").write_bytes(DATA[::-1])
            os.replace(path.parent / "other", path)
            fail(monkeypatch, "pread", errno.ESTALE)
            with pytest.raises(OSError, match="was replaced by another file while it was read"):
                file.read_at(10, 20)

    def test_a_failed_write_or_fsync_is_never_repeated(self, path, monkeypatch, sleeps):
        with DiskFile(path, "r+b") as file:
            fail(monkeypatch, "pwrite", errno.EIO)
            with pytest.raises(OSError, match=str(path)):
                file.write_at(b"x", 0)
            fail(monkeypatch, "fsync", errno.EIO)
            with pytest.raises(OSError, match=str(path)):
                file.sync()
        assert not sleeps

    def test_an_atomic_write_is_repeated_as_a_whole(self, path, monkeypatch, sleeps):
        fail(monkeypatch, "fsync", errno.EIO)
        write_atomically(path, b"new")
        assert (path.read_bytes(), len(sleeps), os.listdir(path.parent)) == (b"new", 1, ["file"])

    def test_a_failing_disk_does_not_make_a_file_missing(self, path, monkeypatch, sleeps):
        fail(monkeypatch, "stat", errno.EIO)
        assert [exists(path), is_regular_file(path), is_folder(path), is_folder(path.parent)] == [
            True,
            True,
            False,
            True,
        ]
        assert [exists(path / "below a file"), exists(path.parent / "missing")] == [False, False]
        fail(monkeypatch, "stat", errno.EIO)
        assert not exists(path.parent / "missing"), "before, the second attempt raised ENOENT"
        fail(monkeypatch, "stat", *[errno.EIO] * 5)
        with pytest.raises(OSError, match=str(path)):
            exists(path)


PACKAGE = Path(megatron_cpt.__file__).parent
_BY_DESCRIPTOR = {"read", "pread", "preadv", "readv", "write", "pwrite", "pwritev", "writev", "sendfile"}
_PATH_QUESTIONS = {f"os.path.{name}" for name in ("exists", "lexists", "isfile", "isdir")}  # False if the disk fails
_UNSAFE = {"np.fromfile", "np.memmap", "mmap.mmap", "pa.memory_map"}  # short, or killed by SIGBUS
_METHODS = {"read_bytes", "read_text", "write_bytes", "write_text", "tofile"}
ALLOWED = {
    "backend/process_age.py": {"Path('/proc/self/stat').read_text"},  # no disk
    "checkpoint/saving/staging.py": {"mmap.mmap"},  # memory without a file
    "config/presets.py": {"(resources.files('megatron_cpt.config') / 'presets' / f'{name}.yaml').read_text"},
    "data/inspect/check_documents.py": {"np.memmap"},  # single tokens all over a file that `scan_ids` has read before
    "data/inspect/scan_ids.py": {"mmap.mmap"},  # MADV_POPULATE_READ gives an error instead of a signal
    "data/preprocess/workers.py": {"mmap.mmap"},  # memory shared by processes, without a file
    "data/tokenfile/disk_cache.py": {"np.memmap"},  # written by all processes of a node, on its own disk
    "evaluate/harness_context.py": {"open"},  # /dev/null
    "evaluate/programs/code_execution.py": {"os.read"},  # a pipe
    "evaluate/programs/sandbox_child.py": {
        "os.path.isdir",  # system folders; a missing one is not mounted
        "os.write",  # to a pipe, in a process that must import little
        *(f"Path('/proc/self/{name}').write_text" for name in ("setgroups", "uid_map", "gid_map")),
    },
    "files/atomic.py": {"open"},  # a device or a pipe
    "files/system_errors.py": {"os.write"},  # to the terminal, in a signal handler
    "report/html_page.py": {"(_ASSETS / name).read_text"},  # files of this package
}
"""Modules with direct calls that are right there, and why."""


def direct_uses(tree: ast.AST) -> set[str]:
    """Return the calls of a module that transfer bytes, or ask for a file, without `whole_io`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            module, _, function = name.rpartition(".")
            is_direct = (module == "os" and function in _BY_DESCRIPTOR) or name in _PATH_QUESTIONS | _UNSAFE
            if is_direct or name == "open" or (module and function in _METHODS):
                found.add(name)
    return found


def test_no_other_module_reads_or_writes_by_itself():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if name != "files/whole_io.py":
            found[name] = direct_uses(ast.parse(file.read_text(encoding="utf-8")))
    assert {name: uses for name, uses in found.items() if uses} == ALLOWED


@pytest.mark.parametrize(
    "code", ["os.pread(fd, 1, 0)", "os.write(fd, b'')", "open(path)", "path.read_bytes()", "np.fromfile(path)"]
)
def test_the_search_finds_direct_uses(code):
    assert direct_uses(ast.parse(code))


def test_a_size_that_the_system_refuses_is_an_error_with_the_name_of_the_file(path):
    with DiskFile(path, "wb") as file, pytest.raises(OSError, match=str(path)):
        file.truncate(1 << 62)
