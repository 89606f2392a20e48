"""Sidecars PREFIX.json: what writes them, what they are compared with, and fingerprints that include them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.data.inspect.check import check_dataset
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.rewrite.merge import merge_datasets
from megatron_cpt.data.rewrite.split import split_datasets
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.header import read_header
from megatron_cpt.data.tokenfile.sidecar import content_faults, read_sidecar
from megatron_cpt.errors import RefusedError

TEXTS = [f"text {number} " * 20 for number in range(40)]
EOD = PreprocessOptions(append_eod=True)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def sidecar_of(prefix: Path):
    sidecar = read_sidecar(read_header(prefix))
    assert sidecar is not None
    return sidecar


def change_middle(prefix: Path, tokens: int = 100) -> None:
    with open(f"{prefix}.bin", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2 // 2 * 2)
        file.write(bytes(2 * tokens))


class TestWriters:
    def test_preprocess(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte", options=EOD)
        sidecar, header = sidecar_of(tmp_path / "web"), read_header(tmp_path / "web")
        origin = sidecar.origin
        assert (origin.tokenizer, origin.fingerprint, origin.eod_id) == ("byte", "byte", 256)
        assert (sidecar.documents, sidecar.tokens) == (header.num_documents, header.num_tokens)
        assert (origin.made_by["command"], origin.made_by["key"]) == ("preprocess", "text")
        assert "megatron_cpt" in origin.versions
        assert content_faults(str(tmp_path / "web"), sidecar) == []

    def test_no_end_of_document(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte")
        assert sidecar_of(tmp_path / "web").origin.eod_id is None

    @pytest.mark.parametrize("options", [{"shuffle": 3}, {}])
    def test_shards_give_the_same_as_one_run(self, texts, tmp_path, options):
        preprocess([texts], tmp_path / "one", tokenizer="byte", options=PreprocessOptions(block_bytes=500, **options))
        for index in range(2):
            part = PreprocessOptions(shard=Shard(index, 2), block_bytes=500, **options)
            preprocess([texts], tmp_path / "two", tokenizer="byte", options=part)
        join_shards(tmp_path / "two", 2)
        assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()

    def test_each_of_several_pairs(self, texts, tmp_path):
        options = PreprocessOptions(split_tokens=3000)
        prefixes = preprocess([texts], tmp_path / "web", tokenizer="byte", options=options).prefixes
        assert len(prefixes) > 1
        for prefix in prefixes:
            assert content_faults(prefix, sidecar_of(Path(prefix))) == []

    def test_a_file_of_the_user_is_kept(self, texts, tmp_path):
        (tmp_path / "web.json").write_text(texts.read_text())
        notes: list[str] = []
        options = PreprocessOptions(notify=notes.append)
        preprocess([tmp_path / "web.json"], tmp_path / "web", tokenizer="byte", options=options)
        assert (tmp_path / "web.json").read_text() == texts.read_text()
        assert any("web.json is not of a dataset and stays" in note for note in notes)
        assert read_sidecar(read_header(tmp_path / "web")) is None

    def test_a_folder_in_its_place_is_kept(self, texts, tmp_path):
        (tmp_path / "a.json").mkdir()
        preprocess([texts], tmp_path / "a", tokenizer="byte")
        assert read_sidecar(read_header(tmp_path / "a")) is None

    def test_merge_and_split(self, texts, tmp_path):
        for name in "ab":
            preprocess([texts], tmp_path / name, tokenizer="byte", options=EOD)
        merged = merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ab"))
        split_datasets([merged.prefix], str(tmp_path / "held"), str(tmp_path / "rest"), fraction=0.3)
        for name, command in (("ab", "merge"), ("held", "split"), ("rest", "split")):
            sidecar = sidecar_of(tmp_path / name)
            assert (sidecar.origin.fingerprint, sidecar.origin.eod_id) == ("byte", 256)
            assert sidecar.origin.made_by["command"] == command
            assert content_faults(str(tmp_path / name), sidecar) == []

    def test_a_part_without_a_sidecar_makes_the_tokenizer_unknown(self, texts, tmp_path, make_dataset):
        preprocess([texts], tmp_path / "a", tokenizer="byte", options=EOD)
        make_dataset("b", [[1, 2]])
        merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ab"))
        origin = sidecar_of(tmp_path / "ab").origin
        assert (origin.tokenizer, origin.fingerprint, origin.eod_id) == (None, None, None)

    def test_replaced_by_a_dataset_without_one(self, texts, tmp_path, make_dataset):
        preprocess([texts], tmp_path / "a", tokenizer="byte")
        make_dataset("a", [[1, 2]])
        assert not (tmp_path / "a.json").exists()


def test_two_tokenizers_are_not_joined(texts, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"text": "1 2 3"}\n')
    preprocess([texts], tmp_path / "a", tokenizer="byte")
    preprocess([tmp_path / "ids.jsonl"], tmp_path / "b", tokenizer="null:257")
    prefixes = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(RefusedError, match=r"b: its ids are of tokenizer null:257, .*a has byte: .*--allow-mixed"):
        merge_datasets(prefixes, str(tmp_path / "ab"))
    assert not (tmp_path / "ab.bin").exists()
    with pytest.raises(RefusedError, match="null:257"):
        split_datasets(prefixes, str(tmp_path / "held"), None, fraction=0.5)
    merge_datasets(prefixes, str(tmp_path / "ab"), allow_mixed_tokenizers=True)
    assert sidecar_of(tmp_path / "ab").origin.fingerprint is None


def test_of_another_pair(texts, tmp_path, make_dataset):
    preprocess([texts], tmp_path / "a", tokenizer="byte")
    sidecar = (tmp_path / "a.json").read_bytes()
    make_dataset("a", [[1, 2]])
    (tmp_path / "a.json").write_bytes(sidecar)
    with pytest.raises(RefusedError, match=r"a\.json: describes 40 documents.* remove .*a\.json if the pair is right"):
        read_sidecar(read_header(tmp_path / "a"))
    assert [one.kind for one in check_dataset(str(tmp_path / "a")).faults] == ["sidecar"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format": "other"}', '{"text": "a"}\n{"text": "b"}\n'])
def test_a_file_of_another_program_is_none(make_dataset, tmp_path, content):
    dataset = make_dataset("a", [[1, 2]])
    (tmp_path / "a.json").write_text(content)
    assert read_sidecar(dataset.header) is None


DAMAGED = [
    ("tokens", None),
    ("documents", "many"),
    ("checksums", ["a", "b"]),
    ("checksums", {"bin": 1, "idx": "2"}),
    ("checksums", {"bin": "1"}),
    ("checksums", {"bin": "1", "idx": "2", "/../other": "3"}),
    ("fingerprint", 5),
    ("eod_id", "</s>"),
    ("made_by", 3),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED)
def test_a_damaged_one_is_refused(texts, tmp_path, key, value):
    preprocess([texts], tmp_path / "a", tokenizer="byte")
    plain = json.loads((tmp_path / "a.json").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps({**plain, key: value}, indent=2))
    with pytest.raises(RefusedError, match=rf"a\.json: damaged \(.*{key}.*\); copy it again, or remove it"):
        read_sidecar(read_header(tmp_path / "a"))
    assert [one.kind for one in check_dataset(str(tmp_path / "a")).faults] == ["sidecar"]


def test_a_truncated_one_is_refused_and_may_be_replaced(texts, tmp_path):
    preprocess([texts], tmp_path / "a", tokenizer="byte")
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:100])
    with pytest.raises(RefusedError, match=r"a\.json: damaged"):
        read_sidecar(read_header(tmp_path / "a"))
    preprocess([texts], tmp_path / "a", tokenizer="byte", options=PreprocessOptions(overwrite=True))
    assert sidecar_of(tmp_path / "a").documents == len(TEXTS)


def test_a_newer_one_is_refused(texts, tmp_path):
    preprocess([texts], tmp_path / "a", tokenizer="byte")
    plain = json.loads((tmp_path / "a.json").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps({**plain, "format_version": 2}))
    with pytest.raises(RefusedError, match=r"a\.json: format version 2, this software reads up to 1; update it"):
        read_sidecar(read_header(tmp_path / "a"))


class TestCheck:
    def test_verifies_the_content(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte", options=EOD)
        report = check_dataset(str(tmp_path / "web"))
        assert report.is_valid
        assert report.to_dict()["content_verified"]
        assert report.documents is not None
        assert report.documents.eod_id == 256
        change_middle(tmp_path / "web")
        (fault,) = [one for one in check_dataset(str(tmp_path / "web")).faults if one.kind == "content"]
        assert fault.file == f"{tmp_path / 'web'}.bin"

    def test_an_index_of_another_dataset(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte")
        index = bytearray((tmp_path / "web.idx").read_bytes())
        lengths = np.frombuffer(index, "<i4", 40, 34)
        pointers = np.frombuffer(index, "<i8", 40, 34 + 4 * 40)
        lengths[3], lengths[4], pointers[4] = lengths[3] - 1, lengths[4] + 1, pointers[4] - 2
        (tmp_path / "web.idx").write_bytes(index)
        assert [one.file[-4:] for one in check_dataset(str(tmp_path / "web")).faults] == [".idx"]

    def test_compares_the_tokenizer(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte")
        assert check_dataset(str(tmp_path / "web"), tokenizer="byte").is_valid
        (fault,) = check_dataset(str(tmp_path / "web"), tokenizer="null:257").faults
        assert "of tokenizer byte, not of null:257" in str(fault)


class TestFingerprint:
    @pytest.fixture
    def large(self, tmp_path) -> Path:
        """A pair of 400 kB without a sidecar."""
        with IndexedDatasetWriter(tmp_path / "large", "<u2") as writer:
            writer.add_documents(np.random.default_rng(1).integers(1, 200, 200_000), [1000] * 200)
        return tmp_path / "large"

    def test_a_changed_middle(self, large):
        before = fingerprint([IndexedDataset(large)])
        assert is_same_data(before, fingerprint([IndexedDataset(large)]))
        change_middle(large, tokens=8000)
        assert not is_same_data(before, fingerprint([IndexedDataset(large)]))

    def test_that_of_an_earlier_version(self, large, tmp_path):
        now = fingerprint([IndexedDataset(large)])
        old = now.split("+")[0]
        assert is_same_data(old, now)
        with IndexedDatasetWriter(tmp_path / "other", "<u2") as writer:
            writer.add_documents(np.zeros(200_000, "<u2"), [1000] * 200)
        assert not is_same_data(old, fingerprint([IndexedDataset(tmp_path / "other")]))

    def test_a_swapped_file_of_equal_length(self, tmp_path):
        """The ends and the sampled blocks are equal; only the content hashes tell the datasets apart."""
        for name, number in (("a", 1), ("b", 2)):
            texts = ["x" * 40_000, str(number), "x" * 40_000]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            preprocess([tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer="byte")
        before = fingerprint([IndexedDataset(tmp_path / "a")])
        for ending in ("bin", "idx", "json"):
            shutil.copy(tmp_path / f"b.{ending}", tmp_path / f"a.{ending}")
        assert not is_same_data(before, fingerprint([IndexedDataset(tmp_path / "a")]))

    def test_a_sidecar_that_comes_or_goes_changes_nothing(self, texts, tmp_path):
        preprocess([texts], tmp_path / "web", tokenizer="byte")
        with_sidecar = fingerprint([IndexedDataset(tmp_path / "web")])
        (tmp_path / "web.json").unlink()
        without = fingerprint([IndexedDataset(tmp_path / "web")])
        assert with_sidecar != without
        assert is_same_data(with_sidecar, without)
        assert is_same_data(without, with_sidecar)
