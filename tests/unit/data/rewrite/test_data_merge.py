"""Merging: byte for byte equal to megatron-core's builder, 64-bit offsets, no incomplete output."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_cpt.data.rewrite.merge import folder_prefixes, merge_datasets
from megatron_cpt.data.tokenfile.header import PREAMBLE
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError, UserError


def build_multimodal(prefix: Path, documents: list[list[list[int]]]) -> None:
    """Build documents of several sequences, each with a mode, with megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    for document in documents:
        lengths = [len(sequence) for sequence in document]
        builder.add_document([i for sequence in document for i in sequence], lengths, list(range(len(lengths))))
    builder.finalize(f"{prefix}.idx")


def merge_by_megatron(prefixes: list[Path], output: Path, dtype: type, *, multimodal: bool = False) -> None:
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype, multimodal=multimodal)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{output}.idx")


def assert_same_files(one: Path, other: Path) -> None:
    for ending in ("bin", "idx"):
        assert Path(f"{one}.{ending}").read_bytes() == Path(f"{other}.{ending}").read_bytes()


@pytest.mark.parametrize(("code", "dtype"), [("<u2", np.uint16), ("<i4", np.int32)])
def test_bytes_of_megatron_core(make_dataset, tmp_path, monkeypatch, code, dtype):
    monkeypatch.setattr("megatron_cpt.data.rewrite.merge._TABLE_BLOCK", 3)
    rng = np.random.default_rng(0)
    for name in "abc":
        make_dataset(name, [rng.integers(0, 999, rng.integers(0, 9)).tolist() for _ in range(8)], code)
    inputs = [tmp_path / name for name in "bca"]
    done: list[int] = []
    merged = merge_datasets([str(one) for one in inputs], str(tmp_path / "out" / "ours"), progress=done.append)
    merge_by_megatron(inputs, tmp_path / "theirs", dtype)
    assert_same_files(tmp_path / "out" / "ours", tmp_path / "theirs")
    assert sum(done) == merged.num_tokens * merged.dtype.itemsize
    assert merged.num_documents == 24


def test_documents_of_several_sequences_and_modes(tmp_path):
    build_multimodal(tmp_path / "a", [[[1, 2], [3]], [[4]]])
    build_multimodal(tmp_path / "b", [[[5], [6, 7], []]])
    merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ours"))
    merge_by_megatron([tmp_path / "a", tmp_path / "b"], tmp_path / "theirs", np.int32, multimodal=True)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_an_empty_one_among_them(make_dataset, tmp_path):
    make_dataset("a", [[1, 2]])
    make_dataset("b", [])
    merged = merge_datasets([str(tmp_path / name) for name in "bab"[:2]], str(tmp_path / "out"))
    assert merged.document(0).tolist() == [1, 2]
    assert merged.num_documents == 1


def test_offsets_beyond_32_bits(tmp_path, monkeypatch):
    """Three sparse files of 2^31 - 1 tokens; only their index is merged, their 12 GB of tokens are not copied."""
    num_tokens = 2**31 - 1
    for name in "abc":
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(2 * num_tokens)
        preamble = PREAMBLE.pack(b"MMIDIDX\0\0", 1, 8, 1, 2)
        (tmp_path / f"{name}.idx").write_bytes(preamble + struct.pack("<iqqq", num_tokens, 0, 0, 1))

    def append_sparsely(writer, dataset, progress):
        writer._datasets.append(dataset)
        writer._bin.truncate(2 * sum(one.num_tokens for one in writer._datasets))

    monkeypatch.setattr("megatron_cpt.data.rewrite.merge._MergeWriter.append", append_sparsely)
    merged = merge_datasets([str(tmp_path / name) for name in "abc"], str(tmp_path / "out"))
    assert merged.num_tokens == 3 * num_tokens > 2**32
    assert merged.sequence_pointers.tolist() == [0, 2 * num_tokens, 4 * num_tokens]
    assert merged.document_at(3 * num_tokens - 1) == 2
    assert merged.document_start(2) == 2 * num_tokens


def test_other_types_are_refused(make_dataset, tmp_path):
    make_dataset("a", [[1]], "<u2")
    make_dataset("b", [[1]], "<i4")
    with pytest.raises(UserError, match=r"b: has int32 tokens, .*a has uint16"):
        merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_damaged_input_leaves_nothing(make_dataset, tmp_path):
    make_dataset("a", [[1, 2]])
    make_dataset("b", [[1, 2]])
    with open(tmp_path / "b.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(RefusedError, match=r"b\.bin"):
        merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_what_is_there_is_not_overwritten(make_dataset, tmp_path):
    make_dataset("a", [[1, 2]])
    make_dataset("out", [[3]])
    with pytest.raises(UserError, match=r"out\.bin and .*out\.idx: exists already"):
        merge_datasets([str(tmp_path / "a")], str(tmp_path / "out"))
    merged = merge_datasets([str(tmp_path / "a")], str(tmp_path / "out"), overwrite=True)
    assert merged.document(0).tolist() == [1, 2]
    with pytest.raises(UserError, match="is an input too"):
        merge_datasets([str(tmp_path / "a")], str(tmp_path / "a"), overwrite=True)


def test_a_folder(make_dataset, tmp_path):
    for name in ("b", "a.1", "a.2"):
        make_dataset(f"all/{name}", [[1]])
    (tmp_path / "all" / "readme.txt").write_text("x")
    assert folder_prefixes(tmp_path / "all") == [str(tmp_path / "all" / name) for name in ("a.1", "a.2", "b")]
    (tmp_path / "all" / "c.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no such file: .*c\.idx"):
        folder_prefixes(tmp_path / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no \.bin/\.idx pair"):
        folder_prefixes(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        folder_prefixes(tmp_path / "none")
    assert IndexedDataset(tmp_path / "all" / "b").num_documents == 1
