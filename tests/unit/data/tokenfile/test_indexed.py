"""Datasets in .bin/.idx: byte for byte equal to megatron-core's, exact reads, and damage is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.tokenfile.header import DTYPE_CODES
from megatron_cpt.data.tokenfile.reader import (
    IndexedDataset,
    IndexedDatasetWriter,
    best_dtype,
    expand_prefixes,
    read_header,
)
from megatron_cpt.errors import RefusedError, UserError

mcore = pytest.importorskip("megatron.core.datasets.indexed_dataset")

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6], []]  # with an empty one inside and at the end
TOKENS = [1, 2, 3, 4, 5, 6]


def build_with_mcore(prefix: Path, documents: list[list[int]], dtype: type, multimodal: bool = False) -> None:
    builder = mcore.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def pair_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


class TestSameAsMegatronCore:
    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    @given(documents=st.lists(st.lists(st.integers(0, 65499), max_size=20), max_size=20))
    def test_bytes(self, tmp_path_factory, dtype, documents):
        folder = tmp_path_factory.mktemp("pair")
        build_with_mcore(folder / "theirs", documents, dtype)
        with IndexedDatasetWriter(folder / "one", dtype) as writer:
            for document in documents:
                writer.add_document(document)
        with IndexedDatasetWriter(folder / "many", dtype) as writer:
            flat = np.array([token for document in documents for token in document], np.int64)
            writer.add_documents(flat, [len(document) for document in documents])
        assert pair_bytes(folder / "one") == pair_bytes(folder / "theirs")
        assert pair_bytes(folder / "many") == pair_bytes(folder / "theirs")

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_they_read_ours(self, tmp_path, make_dataset, dtype):
        make_dataset("ours", DOCUMENTS, dtype)
        theirs = mcore.IndexedDataset(str(tmp_path / "ours"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
        assert theirs.index.dtype == dtype

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_we_read_theirs(self, tmp_path, dtype):
        build_with_mcore(tmp_path / "theirs", DOCUMENTS, dtype)
        ours = IndexedDataset(tmp_path / "theirs")
        assert [ours.document(i).tolist() for i in range(ours.num_documents)] == DOCUMENTS
        assert ours.dtype == dtype

    def test_documents_of_several_sequences(self, tmp_path):
        builder = mcore.IndexedDatasetBuilder(f"{tmp_path}/p.bin", dtype=np.int32)
        builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
        builder.add_document(torch.tensor([6]), [1])
        builder.finalize(f"{tmp_path}/p.idx")
        dataset = IndexedDataset(tmp_path / "p")
        assert (dataset.num_sequences, dataset.num_documents) == (3, 2)
        assert dataset.document(0).tolist() == [1, 2, 3, 4, 5]
        assert dataset.sizes.tolist() == [2, 3, 1]
        assert [dataset.document_at(i) for i in range(6)] == [0, 0, 0, 0, 0, 1]

    def test_multimodal_index_with_modes(self, tmp_path):
        build_with_mcore(tmp_path / "p", DOCUMENTS, np.int32, multimodal=True)
        dataset = IndexedDataset(tmp_path / "p")
        assert dataset.header.has_modes
        assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == DOCUMENTS

    @pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 256000])
    def test_best_dtype(self, vocab_size):
        assert best_dtype(vocab_size) == mcore.DType.optimal_dtype(vocab_size)

    def test_dtype_codes(self):
        assert {code.value: mcore.DType.dtype_from_code(code.value) for code in mcore.DType} == DTYPE_CODES


class TestReading:
    def test_header_without_opening(self, tmp_path, make_dataset):
        make_dataset("p", DOCUMENTS)
        header = read_header(tmp_path / "p")
        assert (header.num_documents, header.num_sequences, header.num_tokens) == (5, 5, 6)
        assert header.dtype == np.uint16
        assert header.prefix == str(tmp_path / "p")

    def test_read_crosses_documents(self, make_dataset):
        dataset = make_dataset("p", DOCUMENTS)
        for start in range(7):
            for count in range(7 - start):
                assert dataset.read(start, count).tolist() == TOKENS[start : start + count]

    @pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 7), (6, 1), (3, -1), (10**15, 1)])
    def test_read_outside(self, make_dataset, start, count):
        with pytest.raises(IndexError, match=r"p\.bin"):
            make_dataset("p", DOCUMENTS).read(start, count)

    def test_documents(self, make_dataset):
        dataset = make_dataset("p", DOCUMENTS)
        assert [dataset.document(i).tolist() for i in range(5)] == DOCUMENTS
        assert [dataset.document_start(i) for i in range(5)] == [0, 3, 3, 4, 6]
        assert [dataset.document_at(i) for i in range(6)] == [0, 0, 0, 2, 3, 3]
        for outside in (-1, 5):
            with pytest.raises(IndexError):
                dataset.document(outside)
        for outside in (-1, 6):
            with pytest.raises(IndexError):
                dataset.document_at(outside)

    @given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=30).filter(any))
    def test_document_at_equals_counting(self, tmp_path_factory, lengths):
        prefix = tmp_path_factory.mktemp("pair") / "p"
        with IndexedDatasetWriter(prefix, "<u2") as writer:
            writer.add_documents(np.zeros(sum(lengths), np.uint16), lengths)
        dataset = IndexedDataset(prefix)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        assert [dataset.document_at(i) for i in range(len(owner))] == owner.tolist()

    def test_tables_and_close(self, make_dataset):
        dataset = make_dataset("p", DOCUMENTS)
        for _ in range(2):  # again after closing
            assert dataset.sizes.tolist() == [3, 0, 1, 2, 0]
            assert dataset.sequence_pointers.tolist() == [0, 6, 6, 8, 12]
            assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
            dataset.close()

    def test_reading_keeps_no_file_open(self, make_dataset):
        datasets = [make_dataset(f"p{i}", DOCUMENTS) for i in range(20)]
        before = len(os.listdir("/proc/self/fd"))
        for dataset in datasets:
            dataset.read(0, 6)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_empty_data_set(self, make_dataset):
        dataset = make_dataset("p", [])
        assert (dataset.num_documents, dataset.num_tokens) == (0, 0)
        assert dataset.read(0, 0).size == 0
        assert len(dataset.sizes) == 0


def cut(path: str, num_bytes: int) -> None:
    os.truncate(path, os.path.getsize(path) - num_bytes)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def grow(path: str, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


IDX_BYTES = 34 + 5 * 4 + 5 * 8 + 6 * 8  # of DOCUMENTS
DAMAGES = {
    "bin cut inside a token": (lambda p: cut(f"{p}.bin", 1), ".bin", "no whole number of uint16 tokens"),
    "bin cut by a token": (lambda p: cut(f"{p}.bin", 2), ".bin", "has 10 bytes, but its .idx describes 12"),
    "bin cut in half": (lambda p: cut(f"{p}.bin", 6), ".bin", "has 6 bytes"),
    "bin emptied": (lambda p: os.truncate(f"{p}.bin", 0), ".bin", "has 0 bytes"),
    "bin grown": (lambda p: grow(f"{p}.bin", b"\1\0"), ".bin", "has 14 bytes"),
    "idx empty": (lambda p: os.truncate(f"{p}.idx", 0), ".idx", "fewer than the 34 of a header"),
    "idx cut in the header": (lambda p: os.truncate(f"{p}.idx", 20), ".idx", "fewer than the 34 of a header"),
    "idx cut": (lambda p: cut(f"{p}.idx", 8), ".idx", f"has {IDX_BYTES - 8} bytes"),
    "idx cut by a byte": (lambda p: cut(f"{p}.idx", 1), ".idx", f"has {IDX_BYTES - 1} bytes"),
    "idx grown": (lambda p: grow(f"{p}.idx", b"\0" * 8), ".idx", f"has {IDX_BYTES + 8} bytes"),
    "foreign": (lambda p: Path(f"{p}.idx").write_bytes(b"TNTIDX\0\0" + bytes(60)), ".idx", "is not a megatron index"),
    "version": (lambda p: patch(f"{p}.idx", 9, struct.pack("<Q", 2)), ".idx", "has version 2"),
    "dtype unknown": (lambda p: patch(f"{p}.idx", 17, b"\x63"), ".idx", "unknown token type code 99"),
    "dtype wrong": (lambda p: patch(f"{p}.idx", 17, b"\x04"), ".idx", "3 int32 tokens from byte 0, and starts"),
    "count too large": (lambda p: patch(f"{p}.idx", 18, struct.pack("<Q", 2**62)), ".idx", "truncated or is damaged"),
    "no boundaries": (lambda p: patch(f"{p}.idx", 26, struct.pack("<Q", 0)), ".idx", "no document boundaries"),
    "last pointer": (
        lambda p: patch(f"{p}.idx", 34 + 20 + 32, struct.pack("<q", 98)),
        ".idx",
        "the next one at byte 98",
    ),
    "first pointer": (lambda p: patch(f"{p}.idx", 34 + 20, struct.pack("<q", 2)), ".idx", "from byte 2"),
    "last size": (lambda p: patch(f"{p}.idx", 34 + 16, struct.pack("<i", -3)), ".idx", "-3 uint16 tokens"),
    "last boundary": (lambda p: patch(f"{p}.idx", IDX_BYTES - 8, struct.pack("<q", 4)), ".idx", "sequence 4 of 5"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_named(tmp_path, make_dataset, name):
    make_dataset("p", DOCUMENTS)
    damage, ending, says = DAMAGES[name]
    damage(tmp_path / "p")
    with pytest.raises(RefusedError) as caught:
        IndexedDataset(tmp_path / "p")
    assert str(caught.value).startswith(f"{tmp_path}/p{ending}: ")
    assert says in str(caught.value)


def test_idx_of_another_pair_is_refused(tmp_path, make_dataset):
    make_dataset("p", DOCUMENTS)
    make_dataset("q", [*DOCUMENTS, [7]])
    os.replace(tmp_path / "q.idx", tmp_path / "p.idx")
    with pytest.raises(RefusedError, match=r"p\.bin.*not a pair"):
        read_header(tmp_path / "p")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_file_is_the_users_mistake(tmp_path, make_dataset, ending):
    make_dataset("p", DOCUMENTS)
    (tmp_path / f"p.{ending}").unlink()
    with pytest.raises(UserError, match=rf"no such file: {tmp_path}/p\.{ending};"):
        read_header(tmp_path / "p")


def test_bin_cut_after_it_was_opened(tmp_path, make_dataset):
    dataset = make_dataset("p", DOCUMENTS)
    cut(f"{tmp_path}/p.bin", 4)
    for start in (0, 2):  # tokens that are left may be of another version, too
        with pytest.raises(RefusedError, match=r"p\.bin: was truncated from 12 to 8 bytes"):
            dataset.read(start, 4)


def write_and_fail(prefix: Path) -> None:
    with contextlib.suppress(KeyError), IndexedDatasetWriter(prefix, "<u2") as writer:
        writer.add_document([9])
        raise KeyError


class TestWriter:
    def test_an_exception_leaves_nothing(self, tmp_path):
        write_and_fail(tmp_path / "p")
        assert os.listdir(tmp_path) == []

    def test_a_kill_leaves_nothing_under_the_final_names(self, tmp_path):
        script = (
            "import os, signal, sys; from megatron_cpt.data import IndexedDatasetWriter\n"
            "with IndexedDatasetWriter(sys.argv[1], '<u2') as writer:\n"
            "    writer.add_documents(range(60000), [60000])\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "p")], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "p.bin").exists()
        assert not (tmp_path / "p.idx").exists()

    def test_an_exception_keeps_the_old_pair(self, tmp_path, make_dataset):
        make_dataset("p", DOCUMENTS)
        before = pair_bytes(tmp_path / "p")
        write_and_fail(tmp_path / "p")
        assert pair_bytes(tmp_path / "p") == before
        assert sorted(os.listdir(tmp_path)) == ["p.bin", "p.idx"]

    @pytest.mark.parametrize("fails_at", ["p.bin", "p.idx"])
    def test_a_crash_while_replacing_never_mixes_old_and_new(self, tmp_path, make_dataset, monkeypatch, fails_at):
        make_dataset("p", [[1, 2]])
        replace = os.replace

        def crash(source, target):
            if target.endswith(fails_at):
                raise OSError("power cut")
            replace(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            make_dataset("p", [[8, 9]])  # of the same size: only its content tells the old from the new
        with pytest.raises(UserError, match=r"p\.idx"):
            read_header(tmp_path / "p")

    @pytest.mark.parametrize(("dtype", "token"), [("<u2", 65536), ("<u2", -1), ("<i4", 2**31)])
    def test_an_id_that_does_not_fit(self, tmp_path, dtype, token):
        with (
            pytest.raises(UserError, match=rf"{token} does not fit"),
            IndexedDatasetWriter(tmp_path / "p", dtype) as writer,
        ):
            writer.add_document([1, token])
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("lengths", [[2], [2, 2], [4, -1]])
    def test_lengths_that_do_not_add_up(self, tmp_path, lengths):
        with pytest.raises(ValueError, match="add up"), IndexedDatasetWriter(tmp_path / "p", "<u2") as writer:
            writer.add_documents([1, 2, 3], lengths)

    def test_unknown_token_type(self, tmp_path):
        with pytest.raises(UserError, match="uint64"):
            IndexedDatasetWriter(tmp_path / "p", np.uint64)

    def test_makes_its_folder(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "new" / "folder" / "p", "<i4") as writer:
            writer.add_document([70000])
        assert IndexedDataset(tmp_path / "new" / "folder" / "p").document(0).tolist() == [70000]


class TestExpandPrefixes:
    def test_prefixes_and_endings(self):
        assert expand_prefixes("a/b") == ["a/b"]
        assert expand_prefixes("a/b.bin") == ["a/b"]
        assert expand_prefixes(["b.idx", "a"]) == ["b", "a"]

    @pytest.mark.parametrize("pattern", ["web_*", "web_*.idx", "web_*.bin", "web_[0-9]"])
    def test_glob(self, tmp_path, pattern):
        for name in ("web_2.idx", "web_2.bin", "web_1.idx", "web_1.bin", "code.idx"):
            (tmp_path / name).touch()
        assert expand_prefixes(f"{tmp_path}/{pattern}") == [f"{tmp_path}/web_1", f"{tmp_path}/web_2"]

    def test_a_real_name_with_brackets(self, tmp_path):
        (tmp_path / "web[1].idx").touch()
        assert expand_prefixes(f"{tmp_path}/web[1]") == [f"{tmp_path}/web[1]"]

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match=r"no file matches .*none\*\.idx"):
            expand_prefixes(f"{tmp_path}/none*")
        with pytest.raises(UserError, match="empty list"):
            expand_prefixes([])
        with pytest.raises(UserError, match="a is named more than once"):
            expand_prefixes(["a", "b", "a.bin"])
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(UserError, match=r"\d/a, \S*/link/a is named more than once, under several paths"):
            expand_prefixes([f"{tmp_path}/link/a", f"{tmp_path}/b", f"{tmp_path}/a"])
        with pytest.raises(UserError, match=r"a\.docs is named more than once"):
            expand_prefixes([f"{tmp_path}/a.docs", f"{tmp_path}/./a.docs"])


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_pipe_or_folder_is_no_dataset(tmp_path, make_dataset, make, ending):
    make_dataset("p", DOCUMENTS)
    path = tmp_path / f"p.{ending}"
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=rf"no such file: {path};"):
        read_header(tmp_path / "p")


def test_a_prefix_with_a_nul_is_no_file():
    with pytest.raises(UserError, match="no such file"):
        read_header("a\0b")
