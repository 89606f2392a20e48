"""`check_dataset`: every kind of damage is reported with file, place and value; valid datasets can be opened."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.inspect.check import check_dataset
from megatron_cpt.data.inspect.check_documents import find_duplicates
from megatron_cpt.data.inspect.scan_ids import LONG_RUN, _find_runs, _join_runs, scan_ids
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.document_lists import write_list

DOCUMENTS = [[1, 2, 3, 9], [4, 5, 9], [6, 7, 8, 1, 2, 9], [5, 9]]  # 15 tokens, all end with 9
SIZES = 34
POINTERS = SIZES + 4 * 4
BOUNDARIES = POINTERS + 8 * 4


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


@pytest.fixture
def sound(make_dataset) -> IndexedDataset:
    return make_dataset("web", DOCUMENTS)


# name -> (what is done to PREFIX.idx and PREFIX.bin, the kind of fault, file ending, place, value)
Damage = tuple[Callable[[Path, Path], None], str, str, str, int | str | None]
AT_OPENING: dict[str, Damage] = {
    "bin cut by a token": (lambda i, b: cut(b, 2), "bin_length", "bin", "", 28),
    "bin cut in a token": (lambda i, b: cut(b, 1), "bin_length", "bin", "", 29),
    "bin too long": (lambda i, b: overwrite(b, 30, b"\1\0"), "bin_length", "bin", "", 32),
    "bin empty": (lambda i, b: os.truncate(b, 0), "bin_length", "bin", "", 0),
    "idx cut": (lambda i, b: cut(i, 3), "idx_length", "idx", "", BOUNDARIES + 40 - 3),
    "idx cut in the header": (lambda i, b: os.truncate(i, 20), "idx_length", "idx", "", 20),
    "idx empty": (lambda i, b: os.truncate(i, 0), "idx_length", "idx", "", 0),
    "idx too long": (lambda i, b: overwrite(i, BOUNDARIES + 40, b"x"), "idx_length", "idx", "", BOUNDARIES + 41),
    "foreign": (lambda i, b: overwrite(i, 0, b"PK\3\4"), "magic", "idx", "bytes 0 to 8", None),
    "version": (lambda i, b: overwrite(i, 9, struct.pack("<Q", 2)), "version", "idx", "byte 9", 2),
    "dtype unknown": (lambda i, b: overwrite(i, 17, b"\x63"), "dtype", "idx", "byte 17", 99),
    "dtype wrong": (lambda i, b: overwrite(i, 17, b"\x01"), "dtype", "idx", "byte 17", "uint8"),
    "last size": (lambda i, b: overwrite(i, SIZES + 12, struct.pack("<i", 3)), "bin_length", "bin", "", 30),
    "last boundary": (
        lambda i, b: overwrite(i, BOUNDARIES + 32, struct.pack("<q", 3)), "documents", "idx", "document 3", 3,
    ),
    "last pointer": (
        lambda i, b: overwrite(i, POINTERS + 24, struct.pack("<q", 28)), "pointers", "idx", "sequence 3", 28,
    ),
    "negative size": (
        lambda i, b: overwrite(i, SIZES, struct.pack("<i", -4)), "sizes", "idx", "sequence 0", -4,
    ),
}  # fmt: skip
INSIDE: dict[str, Damage] = {
    "sizes in the middle": (
        lambda i, b: overwrite(i, SIZES + 4, struct.pack("<i", 5)), "pointers", "idx", "sequence 2", 14,
    ),
    "a pointer in the middle": (
        lambda i, b: overwrite(i, POINTERS + 8, struct.pack("<q", 1000)), "beyond_end", "idx", "sequence 1", 1006,
    ),
    "boundaries out of order": (
        lambda i, b: overwrite(i, BOUNDARIES + 8, struct.pack("<q", 3)), "documents", "idx", "document 2", 2,
    ),
    "first boundary": (
        lambda i, b: overwrite(i, BOUNDARIES, struct.pack("<q", 1)), "documents", "idx", "document 0", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*AT_OPENING, *INSIDE])
def test_every_damage_is_named(sound, name):
    damage, kind, ending, place, value = {**AT_OPENING, **INSIDE}[name]
    damage(Path(f"{sound.prefix}.idx"), Path(f"{sound.prefix}.bin"))
    report = check_dataset(sound.prefix)
    assert not report.is_valid
    assert report.fingerprint is None
    found = [finding for finding in report.faults if (finding.kind, finding.place) == (kind, place)]
    assert found, [str(finding) for finding in report.findings]
    assert found[0].file == f"{sound.prefix}.{ending}"
    assert str(found[0]).startswith(f"{sound.prefix}.{ending}: ")
    if value is not None:
        assert found[0].value == value
        assert str(value) in found[0].problem


@pytest.mark.parametrize("name", AT_OPENING)
def test_the_loader_refuses_it_at_opening(sound, name):
    AT_OPENING[name][0](Path(f"{sound.prefix}.idx"), Path(f"{sound.prefix}.bin"))
    with pytest.raises(RefusedError, match=r"web\.(idx|bin): "):
        TokenStream("web", [IndexedDataset(sound.prefix)], seq_length=4, seed=1)


def test_several_faults_at_once(sound):
    overwrite(Path(f"{sound.prefix}.idx"), 9, struct.pack("<Q", 7))
    overwrite(Path(f"{sound.prefix}.idx"), SIZES + 4, struct.pack("<i", -1))
    cut(Path(f"{sound.prefix}.bin"), 4)
    kinds = {finding.kind for finding in check_dataset(sound.prefix, vocab_size=5).faults}
    assert kinds >= {"version", "sizes", "bin_length", "pointers", "beyond_end", "vocabulary"}


def test_a_wrong_type_that_would_fit_is_said(sound):
    overwrite(Path(f"{sound.prefix}.idx"), 17, b"\x05")  # int64
    uneven, length, dtype = check_dataset(sound.prefix).faults
    assert "not a whole number of int64 tokens" in str(uneven)
    assert "tokens of type int16 or uint16 would fit" in str(length)
    assert "token type int64, 8 bytes, but the pointers fit tokens of 2" in str(dtype)
    cut(Path(f"{sound.prefix}.bin"), 3)  # no length fits any more, but the pointers still tell
    assert [finding.kind for finding in check_dataset(sound.prefix).faults] == ["bin_length", "bin_length", "dtype"]
    assert "would fit" not in str(check_dataset(sound.prefix).faults[1])


def test_a_type_that_is_no_id(make_dataset):
    dataset = make_dataset("floats", DOCUMENTS, "<f4")
    (fault,) = check_dataset(dataset.prefix, vocab_size=10).faults
    assert (fault.kind, fault.value) == ("dtype", "float32")


def test_of_many_places_the_first_are_named_and_all_are_counted(make_dataset):
    dataset = make_dataset("web", [[1, 2]] * 50)
    with open(f"{dataset.prefix}.idx", "r+b") as file:
        file.seek(SIZES + 4 * 50 + 8)
        file.write(np.zeros(40, "<i8").tobytes())
    pointers = [finding for finding in check_dataset(dataset.prefix).faults if finding.kind == "pointers"]
    # the 40 zeros, but sequence 1 + 40 that follows them begins where it should not either
    assert [finding.place for finding in pointers] == [*(f"sequence {i}" for i in range(1, 6)), ""]
    assert pointers[-1].value == 41


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_files(sound, ending):
    os.unlink(f"{sound.prefix}.{ending}")
    with pytest.raises(UserError, match=rf"no such file: .*web\.{ending}"):
        check_dataset(sound.prefix)


def test_a_sound_one(sound):
    report = check_dataset(sound.prefix, vocab_size=10)
    assert report.is_valid
    assert report.findings == ()
    assert report.scan is not None
    assert (report.scan.max_id, report.scan.num_bytes) == (9, 30)
    assert report.documents is not None
    assert (report.documents.eod_id, report.documents.likely_eod_id, report.documents.likely_share) == (None, 9, 1.0)
    assert report.fingerprint == fingerprint([sound])


def test_an_empty_one(make_dataset):
    report = check_dataset(make_dataset("none", []).prefix, vocab_size=10)
    assert report.is_valid
    assert report.scan is not None
    assert report.scan.max_id is None


class TestIds:
    def test_beyond_the_vocabulary(self, make_dataset):
        dataset = make_dataset("web", [[1, 2, 9], [3, 700, 9], [800, 9]])
        report = check_dataset(dataset.prefix, vocab_size=100)
        assert [(one.place, one.value) for one in report.faults] == [
            ("token 4 of document 1", 700),
            ("token 6 of document 2", 800),
        ]
        assert "id 700 is outside of the vocabulary of 100" in str(report.faults[0])
        assert check_dataset(dataset.prefix, vocab_size=801).is_valid
        assert check_dataset(dataset.prefix).is_valid

    def test_negative(self, make_dataset):
        dataset = make_dataset("web", [[1, -2, 9]], "<i4")
        (fault,) = check_dataset(dataset.prefix).faults
        assert (fault.kind, fault.place, fault.value) == ("vocabulary", "token 1 of document 0", -2)

    @pytest.mark.parametrize("num_threads", [1, 2, 3])
    @pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "u1"])
    @pytest.mark.parametrize("advice", [22, 9999], ids=["mapped", "copied"])  # 9999: a kernel that does not know it
    def test_a_file_of_many_blocks(self, tmp_path, monkeypatch, num_threads, dtype, advice):
        monkeypatch.setattr("megatron_cpt.data.inspect.scan_ids._BLOCK_BYTES", 1 << 12)
        monkeypatch.setattr("megatron_cpt.data.inspect.scan_ids._MADV_POPULATE_READ", advice)
        rng = np.random.default_rng(3)
        ids = rng.integers(0, 90, 50_001).astype(dtype)
        places = sorted(rng.choice(len(ids), 9, replace=False).tolist())
        ids[places] = 100
        ids[-1] = 120
        path = tmp_path / "x.bin"
        path.write_bytes(ids.tobytes())
        done: list[int] = []
        scan = scan_ids(str(path), ids.dtype, len(ids), 100, num_threads=num_threads, progress=done.append)
        assert scan.max_id == 120
        assert scan.num_outside == 10
        assert scan.first_outside == tuple((place, 100) for place in places[:5])
        assert sum(done) == scan.num_bytes == ids.nbytes

    @pytest.mark.parametrize("advice", [22, 9999], ids=["mapped", "copied"])
    def test_a_file_that_is_cut_meanwhile_is_an_error_and_no_signal(self, tmp_path, monkeypatch, advice):
        monkeypatch.setattr("megatron_cpt.data.inspect.scan_ids._BLOCK_BYTES", 1 << 12)
        monkeypatch.setattr("megatron_cpt.data.inspect.scan_ids._MADV_POPULATE_READ", advice)
        path = tmp_path / "x.bin"
        path.write_bytes(bytes(1 << 15))
        with pytest.raises(RefusedError, match=r"x\.bin: byte 4097: the file ends here"):
            scan_ids(
                str(path), np.dtype("<u2"), 1 << 14, num_threads=1, progress=lambda _: os.truncate(path, (1 << 12) + 1)
            )

    def test_the_last_page_is_not_taken_for_zeros(self, tmp_path):
        path = tmp_path / "x.bin"
        path.write_bytes(bytes(100))
        with pytest.raises(RefusedError, match=r"x\.bin: byte 98: the file ends here"):
            scan_ids(str(path), np.dtype("<u2"), 50, num_threads=1, progress=lambda _: os.truncate(path, 98))

    def test_a_file_that_is_too_short(self, tmp_path):
        path = tmp_path / "x.bin"
        path.write_bytes(bytes(100))
        with pytest.raises(RefusedError, match=r"x\.bin: byte 100: the file ends here"):
            scan_ids(str(path), np.dtype("<u2"), 60)


class TestRunsOfOneId:
    def test_a_file_of_zeros(self, make_dataset):
        report = check_dataset(make_dataset("zeros", [[0] * 500, [0] * 700]).prefix)
        (fault,) = report.faults
        assert "id 0 stands 1,200 times in a row" in str(fault)

    @pytest.mark.parametrize("start", [0, 1000, 70_001])
    def test_a_hole_in_the_middle(self, tmp_path, monkeypatch, start):
        ids = np.random.default_rng(1).integers(1, 50, 200_000)
        ids[start : start + 50_000] = 0
        with IndexedDatasetWriter(tmp_path / "web", "<u2") as writer:
            writer.add_documents(ids, [1000] * 200)
        monkeypatch.setattr("megatron_cpt.data.inspect.scan_ids._BLOCK_BYTES", 1 << 16)
        report = check_dataset(str(tmp_path / "web"))
        assert report.is_valid
        (run,) = [one for one in report.findings if one.kind == "run_of_one_id"]
        assert run.value == 0
        assert report.scan is not None
        ((first, count, token),) = report.scan.long_runs
        assert token == 0
        assert start <= first < start + 4096
        assert start + 50_000 - 4096 < first + count <= start + 50_000

    @pytest.mark.parametrize("start", [0, 513, 4095])
    def test_the_shortest_that_is_certainly_found(self, start):
        ids = np.random.default_rng(1).integers(1, 50, 50_000).astype("<u2")
        ids[start : start + LONG_RUN] = 0
        assert len(_join_runs(_find_runs(ids, 0), ids.size)) == 1

    def test_text_has_none(self, make_dataset):
        report = check_dataset(make_dataset("web", [[1, 2] * 5000, [3] * 1000, [9] * 50]).prefix)
        assert report.scan is not None
        assert report.scan.long_runs == ()


def test_too_short_for_a_sample(make_dataset):
    prefix = make_dataset("web", [[1, 2, 9]]).prefix
    (finding,) = [one for one in check_dataset(prefix, seq_length=3).findings if one.kind == "too_short"]
    assert "3 tokens are too few for a sample of 4: it is never read" in str(finding)
    assert "too_short" not in {one.kind for one in check_dataset(prefix, seq_length=2).findings}


class TestDocuments:
    def test_empty_ones(self, make_dataset):
        report = check_dataset(make_dataset("web", [[], [1, 9], [], [2, 9], []]).prefix)
        assert report.is_valid
        assert report.documents is not None
        assert report.documents.num_empty == 3
        assert [one.place for one in report.findings] == ["document 0", "document 2", "document 4"]

    def test_missing_end_of_document(self, make_dataset):
        dataset = make_dataset("web", [[1, 9], [2, 9], [3, 4], [], [5, 9]])
        report = check_dataset(dataset.prefix)
        assert report.is_valid
        (missing,) = [one for one in report.findings if one.kind == "no_eod"]
        assert (missing.level, missing.value) == ("warning", 9)
        assert "75.0% of the documents end with id 9, which may only end a sentence" in str(missing)
        assert report.to_dict()["eod_id"] is None
        asked_for = check_dataset(dataset.prefix, eod_id=9)
        assert [(one.kind, one.place, one.value) for one in asked_for.faults] == [("missing_eod", "document 2", 4)]
        other = check_dataset(dataset.prefix, eod_id=4)
        assert [one.place for one in other.faults] == ["document 0", "document 1", "document 4"]

    def test_no_common_end(self, make_dataset):
        report = check_dataset(make_dataset("web", [[1, 2], [3, 4], [5, 6]]).prefix)
        assert report.is_valid
        assert [one.kind for one in report.findings] == ["no_eod"]
        assert report.documents is not None
        assert report.documents.num_without_eod is None

    def test_duplicates(self, make_dataset):
        long = list(range(100, 160))
        almost = [*long[:10], 99, *long[11:]]  # differs where the probes do not look
        documents = [long, [1], almost, [2, 2], long, [], [1], [1], []]
        dataset = make_dataset("web", documents)
        assert find_duplicates(dataset) == [(4, 0), (6, 1), (7, 1)]
        report = check_dataset(dataset.prefix)
        copies = [one for one in report.findings if one.kind == "duplicate_document"]
        assert [(one.place, one.value) for one in copies] == [("document 4", 0), ("document 6", 1), ("document 7", 1)]
        assert report.is_valid
        quick = check_dataset(dataset.prefix, duplicates=False)
        assert quick.documents is not None
        assert quick.documents.num_duplicates is None

    def test_duplicates_against_a_plain_search(self, make_dataset):
        rng = np.random.default_rng(5)
        documents = [rng.integers(0, 3, rng.integers(0, 40)).tolist() for _ in range(2000)]
        documents += [documents[i] for i in rng.integers(0, 2000, 50)]
        firsts: dict[tuple[int, ...], int] = {}
        expected = []
        for number, document in enumerate(documents):
            first = firsts.setdefault(tuple(document), number)
            if document and first != number:
                expected.append((number, first))
        assert find_duplicates(make_dataset("web", documents)) == expected

    def test_documents_of_several_sequences(self, tmp_path):
        """A handwritten index: document 0 has two sequences, document 1 none, document 2 one."""
        ids = np.array([1, 2, 9, 3, 9], "<u2")
        (tmp_path / "m.bin").write_bytes(ids.tobytes())
        preamble = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 4)
        tables = struct.pack("<3i3q4q", 2, 1, 2, 0, 4, 6, 0, 2, 2, 3)
        (tmp_path / "m.idx").write_bytes(preamble + tables)
        report = check_dataset(str(tmp_path / "m"), eod_id=9)
        assert report.is_valid
        assert [(one.kind, one.place) for one in report.findings] == [("empty_document", "document 1")]


def test_in_blocks_as_in_one(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 6, 3000)
    with IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        writer.add_documents(rng.integers(0, 50, lengths.sum()), lengths)
    whole = check_dataset(str(tmp_path / "x"), vocab_size=40).to_dict()
    monkeypatch.setattr("megatron_cpt.data.inspect.check_index._BLOCK_ENTRIES", 7)
    monkeypatch.setattr("megatron_cpt.data.tokenfile.documents.BLOCK_DOCUMENTS", 11)
    blocks = check_dataset(str(tmp_path / "x"), vocab_size=40).to_dict()
    for report in (whole, blocks):
        del report["ids"]["seconds"], report["ids"]["gigabytes_per_second"]
    assert blocks == whole
    assert whole["empty_documents"] == int((lengths == 0).sum())


def test_a_document_list_is_checked_with_its_pairs(sound, make_dataset, tmp_path, capsys):
    other = make_dataset("code", DOCUMENTS[:2])
    path = str(write_list(tmp_path / "mined.docs", [sound, other], [(0, 0), (0, 2), (1, 1)]))
    assert main(["check", path, "--vocab-size", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{path}: valid", "  3 documents, 13 uint16 tokens"]
    assert [line for line in lines if line.endswith(": valid")][1:] == [
        f"{sound.prefix}: valid",
        f"{other.prefix}: valid",
    ]
    assert main(["inspect", path, "--document", "1"]) == 0
    assert "6 7 8 1 2 9" in capsys.readouterr().out.replace(",", "")
    overwrite(tmp_path / "web.bin", 0, b"\2")
    assert main(["check", path]) == 3
    assert f"fault: {path}: {sound.prefix}: is not the dataset that" in capsys.readouterr().out
