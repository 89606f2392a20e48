"""Sources in a store that fsspec opens: the samples of local files, ranges only, retries, clear errors."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes, read_header
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.files import remote
from megatron_cpt.files.remote import find, is_file, is_remote, open_ranges
from megatron_cpt.prepare import prepare_run

fsspec = pytest.importorskip("fsspec")

S = 16


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def upload(memory, tmp_path: Path) -> Callable[[str], str]:
    """upload(name) puts the pair NAME of tmp_path into memory:///bucket/."""

    def put(name: str) -> str:
        for ending in (".bin", ".idx"):
            memory.pipe_file(f"memory:///bucket/{name}{ending}", (tmp_path / f"{name}{ending}").read_bytes())
        return f"memory:///bucket/{name}"

    return put


def test_the_same_samples_and_fingerprint(counting_dataset, upload):
    local = [counting_dataset("a", 300), counting_dataset("b", 200, 1000)]
    stored = [IndexedDataset(upload(name)) for name in ("a", "b")]
    here, there = (TokenStream("web", files, seq_length=S, seed=1) for files in (local, stored))
    assert [there.read(k).tolist() for k in range(80)] == [here.read(k).tolist() for k in range(80)]
    assert is_same_data(fingerprint(stored), fingerprint(local))
    other = [IndexedDataset(upload("b")), IndexedDataset(upload("a"))]
    assert not is_same_data(fingerprint(stored), fingerprint(other))


def test_tables_and_documents(make_dataset, upload):
    documents = [[1, 2, 3], [], [4], [5, 6], []]
    make_dataset("p", documents)
    dataset = IndexedDataset(upload("p"))
    assert [dataset.document(i).tolist() for i in range(5)] == documents
    assert [dataset.document_at(i) for i in range(6)] == [0, 0, 0, 2, 3, 3]
    assert dataset.sizes.tolist() == [3, 0, 1, 2, 0]


def test_only_ranges_are_read(counting_dataset, upload, memory, monkeypatch):
    counting_dataset("big", 1_000_000)
    prefix = upload("big")
    ranges = []
    cat_file = type(memory).cat_file

    def recorded(self, path, start=None, end=None, **kwargs):
        ranges.append((path.rpartition(".")[2], end - start))
        return cat_file(self, path, start, end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", recorded)
    stream = TokenStream("web", [IndexedDataset(prefix)], seq_length=S, seed=1)
    assert {kind for kind, _ in ranges} == {"idx"}
    assert sum(count for _, count in ranges) < 100
    ranges.clear()
    stream.read(5)
    assert ranges == [("bin", 4 * (S + 1))]


def test_globs(make_dataset, upload):
    for name in ("web_2", "web_1", "code", "web-3"):
        make_dataset(name, [[1, 2]])
        upload(name)
    assert expand_prefixes("memory:///bucket/web_*") == ["memory:///bucket/web_1", "memory:///bucket/web_2"]
    assert expand_prefixes(["memory:///bucket/code.bin"]) == ["memory:///bucket/code"]
    with pytest.raises(UserError, match="no file matches memory:///bucket/none"):
        expand_prefixes("memory:///bucket/none*")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing(make_dataset, upload, memory, ending):
    make_dataset("p", [[1, 2]])
    prefix = upload("p")
    memory.rm_file(f"{prefix}.{ending}")
    with pytest.raises(UserError, match=rf"no such file: memory:///bucket/p\.{ending};"):
        read_header(prefix)


@pytest.mark.parametrize(("ending", "left"), [("idx", 0), ("idx", 20), ("bin", 2)])
def test_damaged(make_dataset, upload, memory, ending, left):
    make_dataset("p", [[1, 2], [3]])
    prefix = upload("p")
    memory.pipe_file(f"{prefix}.{ending}", memory.cat_file(f"{prefix}.{ending}")[:left])
    with pytest.raises(RefusedError, match=rf"memory:///bucket/p\.{ending}"):
        read_header(prefix)


def test_cut_while_it_is_read(counting_dataset, upload, memory):
    counting_dataset("p", 100)
    dataset = IndexedDataset(upload("p"))
    memory.pipe_file("memory:///bucket/p.bin", b"\0" * 40)
    with pytest.raises(RefusedError, match=r"p\.bin: was truncated from 400 to 40 bytes"):
        dataset.read(5, 20)


def test_a_run_is_prepared_from_it(run_data, write_run, counting_dataset, upload):
    for name, source in run_data["sources"].items():
        counting_dataset(name, 20_000)
        source.pop("tokens", None)
        source["path"] = upload(name)
    prepared = prepare_run(write_run(run_data), need_files=True)
    assert prepared.source_tokens == dict.fromkeys(run_data["sources"], 20_000)
    assert prepared.prefixes["web"] == ["memory:///bucket/web"]


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"s3:// cannot be opened: .*pip install -e '.*\[cloud\]'"):
        read_header("s3://bucket/web")


def test_a_protocol_that_is_not_known():
    with pytest.raises(UserError, match="nosuch:// cannot be opened"):
        IndexedDataset("nosuch://bucket/web")


def test_local_and_remote_say_the_same(tmp_path, memory):
    (tmp_path / "file").write_bytes(bytes(range(10)))
    memory.pipe_file("memory:///bucket/file", bytes(range(10)))
    for path in (str(tmp_path / "file"), "memory:///bucket/file"):
        assert is_remote(path) == path.startswith("memory")
        assert is_file(path)
        assert not is_file(f"{path}2")
        assert find(f"{path[:-2]}*") == [path]
        with open_ranges(path) as file:
            assert file.size == 10
            assert [file.read(3, 4), file.read(8, 4), file.read(10, 4), file.read(50, 4)] == [
                bytes([3, 4, 5, 6]),
                bytes([8, 9]),
                b"",
                b"",
            ]
            buffer = bytearray(4)
            assert file.read_into(memoryview(buffer), 8) == 2
            assert buffer == bytes([8, 9, 0, 0])


class TestRetries:
    PATH = "memory:///bucket/file"

    @pytest.fixture
    def fail(self, memory, monkeypatch):
        """fail(n, error): the next n requests of any kind raise; returns the list of requests."""
        memory.pipe_file(self.PATH, b"0123456789")
        monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0,) * 4)

        def install(number, error):
            requests = []

            def failing(method):
                def call(*args, **kwargs):
                    requests.append(method.__name__)
                    if len(requests) <= number:
                        raise error
                    return method(*args, **kwargs)

                return call

            for name in ("cat_file", "size", "isfile", "glob"):
                monkeypatch.setattr(memory, name, failing(getattr(memory, name)), raising=False)
            return requests

        return install

    @pytest.mark.parametrize("error", [OSError("reset by peer"), TimeoutError(), RuntimeError("503 Slow Down")])
    def test_a_request_that_fails_four_times_succeeds(self, fail, error, caplog):
        with open_ranges(self.PATH) as file:
            requests = fail(4, error)
            buffer = bytearray(3)
            with caplog.at_level(logging.WARNING, remote.__name__):
                assert file.read_into(memoryview(buffer), 2) == 3
        assert buffer == b"234"
        assert requests == ["cat_file"] * 5
        messages = [record.getMessage() for record in caplog.records]
        assert messages[0].startswith(f"{self.PATH}: attempt 1 of 5 failed ({type(error).__name__}: {error}); retrying")
        assert len(messages) == 4

    @pytest.mark.parametrize("request_of", ["size", "is_file", "find"])
    def test_every_kind_of_request_is_retried(self, fail, request_of):
        requests = fail(2, OSError("reset by peer"))
        if request_of == "size":
            assert open_ranges(self.PATH).size == 10
        else:
            assert {"is_file": is_file, "find": find}[request_of](self.PATH)
        assert len(requests) >= 3

    def test_five_failures_are_an_error_that_names_the_file(self, fail):
        requests = fail(5, OSError("reset by peer"))
        with pytest.raises(CptError, match=r"bucket/file: cannot be read, 5 attempts failed \(OSError: reset"):
            open_ranges(self.PATH).read_into(memoryview(bytearray(3)), 0)
        assert requests == ["cat_file"] * 5

    @pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("403")])
    def test_lasting_errors_are_not_retried(self, fail, error):
        requests = fail(1, error)
        with pytest.raises(type(error)):
            open_ranges(self.PATH).read_into(memoryview(bytearray(3)), 0)
        assert requests == ["cat_file"]

    def test_delays_grow_and_leave_the_global_generator_alone(self, fail, monkeypatch):
        slept: list[float] = []
        fail(4, OSError("reset by peer"))
        monkeypatch.setattr(remote, "RETRY_DELAYS", (2, 4, 8, 16))
        monkeypatch.setattr("time.sleep", slept.append)
        before = random.getstate()
        assert open_ranges(self.PATH).size == 10
        assert random.getstate() == before
        assert all(0.5 <= seconds / mean <= 1.5 for seconds, mean in zip(slept, (2, 4, 8, 16), strict=True))
