"""Every format that is read gives its documents; what is not read is named, with the command that converts it."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.data.preprocess.inputs import Shard, expand_inputs
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import RefusedError, UserError

TEXTS = ["one", "zwei äöü\nzwei", '三, "drei"', "four " * 50]
SMALL = PreprocessOptions(block_bytes=64)


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def documents(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer("byte")
    return [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def encode(tmp_path: Path, name: str, data: bytes, options: PreprocessOptions = SMALL) -> list[str]:
    (tmp_path / name).write_bytes(data)
    preprocess([tmp_path / name], tmp_path / "p", tokenizer="byte", options=options)
    return documents(tmp_path / "p")


class TestJsonLikePythonReadsIt:
    def test_numbers_that_are_not_json(self, tmp_path):
        lines = [f'{{"score": {number}, "text": "{number}"}}' for number in ("NaN", "Infinity", "-Infinity", "1")]
        assert encode(tmp_path, "a.jsonl", "\n".join(lines).encode()) == ["NaN", "Infinity", "-Infinity", "1"]

    def test_a_number_of_many_digits_in_an_array(self, tmp_path):
        data = b'[\n{"text": "one"},\n{"text": "two", "n": ' + b"1" * 5000 + b'},\n{"text": "three"}]'
        assert encode(tmp_path, "a.json", data) == ["one", "three"]

    def test_several_keys(self, tmp_path):
        lines = b'{"a": "1", "b": "2", "c": NaN}\n{"a": "3", "c": NaN}\n'
        (tmp_path / "a.jsonl").write_bytes(lines)
        options = PreprocessOptions(key=["b", "a"])
        report = preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=options)
        assert (documents(tmp_path / "p_a"), documents(tmp_path / "p_b")) == (["1", "3"], ["2"])
        assert report.bad_lines == 1

    def test_a_lone_surrogate_in_another_field(self, tmp_path):
        lines = b'{"text": "good", "other": "\\ud800"}\n{"text": "\\ud800"}\n{"text": "", "other": NaN}\n'
        assert encode(tmp_path, "a.jsonl", lines) == ["good"]
        (line,) = (tmp_path / "p.bad.jsonl").read_text().splitlines()
        assert json.loads(line)["line"] == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.txt"])
def test_byte_order_marks(tmp_path, encoding, name):
    text = {"a.csv": 'id,text\n1,one\n2,"zwei äöü\nzwei"\n', "a.txt": "one\nzwei äöü"}.get(name, jsonl(TEXTS).decode())
    data = text.encode(encoding)
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + data
    expected = {"a.csv": TEXTS[:2], "a.txt": [text]}.get(name, TEXTS)
    assert encode(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data) == expected


def test_utf_16_without_a_mark_is_explained(tmp_path):
    with pytest.raises(UserError, match="UTF-16 needs its byte order mark"):
        encode(tmp_path, "a.jsonl", jsonl(["one"]).decode().encode("utf-16-le"))


class TestJsonOverSeveralLines:
    rows = tuple({"text": text, "more": {"list": [1, "]}"]}} for text in TEXTS * 30)

    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
    def test_an_array(self, tmp_path, name, indent):
        data = json.dumps(self.rows, indent=indent).encode()
        assert encode(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data) == TEXTS * 30

    def test_objects_over_several_lines(self, tmp_path):
        data = "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in self.rows).encode()
        assert encode(tmp_path, "a.json", b"\xef\xbb\xbf" + data) == TEXTS * 30

    def test_documents_longer_than_a_piece(self, tmp_path):
        texts = ["x" * 3_000_000, "ä" * 2_000_000]
        assert encode(tmp_path, "a.json", json.dumps([{"text": text} for text in texts]).encode()) == texts

    def test_bad_values_are_numbered(self, tmp_path):
        data = json.dumps([{"text": "one"}, {"title": "x"}, "two", {"text": "three"}], indent=2).encode()
        assert encode(tmp_path, "a.json", data) == ["one", "three"]
        lines = [json.loads(line) for line in (tmp_path / "p.bad.jsonl").read_text().splitlines()]
        assert [line["line"] for line in lines] == [2, 3]

    @pytest.mark.parametrize(("cut", "says"), [(-1, "ends inside of a JSON array"), (-20, "value 120 is cut off")])
    def test_a_cut_array_is_damage(self, tmp_path, cut, says):
        with pytest.raises(RefusedError, match=says):
            encode(tmp_path, "a.json", json.dumps(self.rows).encode()[:cut])

    def test_shards(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(self.rows))
        (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS * 30))
        for index in range(3):
            options = PreprocessOptions(block_bytes=500, shard=Shard(index, 3))
            preprocess([tmp_path / "*.json*"], tmp_path / "p", tokenizer="byte", options=options)
        join_shards(tmp_path / "p", 3)
        assert documents(tmp_path / "p") == TEXTS * 60


class TestTables:
    def test_csv_and_tsv(self, tmp_path):
        import csv

        for name, delimiter in (("a.csv", ","), ("a.tsv.gz", "\t")):
            with io.StringIO(newline="") as table:
                writer = csv.writer(table, delimiter=delimiter)
                writer.writerows([["id", "text"], *enumerate(TEXTS * 10)])
                data = table.getvalue().encode()
            assert encode(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data) == TEXTS * 10
            (tmp_path / "p.bin").unlink()
            (tmp_path / "p.idx").unlink()

    def test_bad_rows(self, tmp_path):
        assert encode(tmp_path, "a.csv", b"id,text\n1,one\n2\n3,caf\xe9\n4,four,4\n\n5,five\n") == ["one", "five"]
        lines = [json.loads(line) for line in (tmp_path / "p.bad.jsonl").read_text().splitlines()]
        assert [(line["line"], line["reason"][:20]) for line in lines] == [
            (2, "has another number o"),
            (3, "the value of 'text' "),
            (4, "has another number o"),
        ]

    @pytest.mark.parametrize("head", ["id,text\n", "text,id\n"])
    def test_a_quote_that_is_not_closed_is_damage(self, tmp_path, head):
        rows = "".join(f"one {number},two {number}\n" for number in range(300))
        with pytest.raises(RefusedError, match=r"a\.csv: truncated or corrupt .* row 301 begins a quoted value"):
            encode(tmp_path, "a.csv", (head + rows + 'three,"' + rows).encode())
        assert encode(tmp_path, "b.csv", f'{head}1,1\n"2","2"'.encode()) == ["1", "2"]

    def test_rows_lost_in_quotes_count_by_their_bytes(self, tmp_path):
        """A stray quote that a later one closes makes one bad row of many."""
        rows = "".join(f"{number},{'text ' * 20}\n" for number in range(20_000))
        data = "id,text\n" + rows + '"' + rows + '"\n' + rows
        with pytest.raises(RefusedError, match=r"bytes are bad, more than 0\.1000%"):
            encode(tmp_path, "a.csv", data.encode(), PreprocessOptions())

    def test_no_such_column(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.csv: has no column 'text'; its columns are 'id', 'body'"):
            encode(tmp_path, "a.csv", b"id,body\n1,x\n")


def test_a_text_file_is_one_document(tmp_path):
    for name, text in (("b.txt", "second\n"), ("a.txt", "first\n\nline")):
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    preprocess([tmp_path], tmp_path / "out" / "p", tokenizer="byte")
    assert documents(tmp_path / "out" / "p") == ["first\n\nline", "second\n"]
    with pytest.raises(UserError, match=r"a \.txt file is one document and has no keys"):
        preprocess([tmp_path], tmp_path / "q", tokenizer="byte", options=PreprocessOptions(key=["text", "b"]))


class TestArrow:
    table = pa.table({"id": range(len(TEXTS) * 100), "text": TEXTS * 100})

    @pytest.mark.parametrize("write", [pa.ipc.new_stream, pa.ipc.new_file])
    def test_stream_and_file(self, tmp_path, write):
        sink = pa.BufferOutputStream()
        with write(sink, self.table.schema) as writer:
            writer.write_table(self.table, max_chunksize=70)
        assert encode(tmp_path, "a.arrow", sink.getvalue().to_pybytes()) == TEXTS * 100

    def test_a_cut_stream(self, tmp_path):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table, max_chunksize=70)
        data = sink.getvalue().to_pybytes()
        for cut in (len(data) // 2, len(data) - 8):
            with pytest.raises(RefusedError, match=r"a\.arrow: truncated or corrupt"):
                encode(tmp_path, "a.arrow", data[:cut])

    def test_a_folder_that_datasets_has_saved(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        whole = datasets.Dataset(self.table)
        datasets.DatasetDict({"train": whole, "test": whole.select(range(4))}).save_to_disk(
            str(tmp_path / "saved"), num_shards={"train": 3, "test": 1}
        )
        notes: list[str] = []
        options = PreprocessOptions(notify=notes.append)
        preprocess([tmp_path / "saved" / "train"], tmp_path / "p", tokenizer="byte", options=options)
        assert documents(tmp_path / "p") == TEXTS * 100
        assert notes == []
        assert len(expand_inputs([tmp_path / "saved"])) == 4


class TestNestedKeys:
    rows = tuple({"meta": {"text": f"{i}", "parts": [{"body": f"b{i}"}, {"body": "x"}]}, "n": i} for i in range(9))

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
    @pytest.mark.parametrize(("key", "first"), [("meta.text", ""), ("meta.parts.0.body", "b")])
    def test_fields_of_objects_and_elements_of_lists(self, tmp_path, name, key, first):
        table = pa.Table.from_pylist(list(self.rows))
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        elif name == "a.arrow":
            with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
                writer.write_table(table)
        else:
            (tmp_path / name).write_text("\n".join(map(json.dumps, self.rows)))
        preprocess([tmp_path / name], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(key=key))
        assert documents(tmp_path / "p") == [f"{first}{i}" for i in range(9)]

    def test_a_key_of_the_whole_name_comes_first(self, tmp_path):
        lines = b'{"a.b": "whole", "a": {"b": "nested"}}\n{"a": {"b": "nested"}}\n{"a": "none"}\n{"a": null}\n'
        assert encode(tmp_path, "a.jsonl", lines, PreprocessOptions(key="a.b")) == ["whole", "nested"]
        assert len((tmp_path / "p.bad.jsonl").read_text().splitlines()) == 2

    @pytest.mark.parametrize("key", ["meta.title", "meta.text.x", "meta.parts.body", "n.x", "none.text"])
    def test_no_such_field_of_parquet(self, tmp_path, key):
        pq.write_table(pa.Table.from_pylist(list(self.rows)), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"a\.parquet: has no column '{key}'; "):
            preprocess([tmp_path / "a.parquet"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(key=key))

    def test_nulls_and_short_lists(self, tmp_path):
        rows = [{"meta": None}, {"meta": {"parts": []}}, {"meta": {"parts": ["good"]}}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        options = PreprocessOptions(key="meta.parts.0")
        report = preprocess([tmp_path / "a.parquet"], tmp_path / "p", tokenizer="byte", options=options)
        assert (documents(tmp_path / "p"), report.bad_lines) == (["good"], 2)


def test_standard_input(tmp_path):
    code = (
        "import sys; from megatron_cpt.cli import main\n"
        "sys.exit(main(['preprocess', '--input', '-', '--output-prefix', 'p', '--tokenizer', 'byte', '--overwrite']))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code]
    for data in (jsonl(TEXTS), gzip.compress(jsonl(TEXTS))):
        done = subprocess.run(command, input=data, cwd=tmp_path, env=environment, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert documents(tmp_path / "p") == TEXTS
        assert sorted(os.listdir(tmp_path)) == ["p.bin", "p.idx", "p.json"]


class TestFolders:
    def test_files_that_are_not_read_are_named(self, tmp_path):
        for name in ("a.jsonl", "b.ndjson", "C.JSONL", "d.jsonl.bz2", "e.csv", "notes.txt", "f.doc", "g.jsonl.lz4"):
            (tmp_path / name).touch()
        notes: list[str] = []
        found = [Path(path).name for path in expand_inputs([tmp_path], notes.append)]
        assert found == ["C.JSONL", "a.jsonl", "b.ndjson", "d.jsonl.bz2", "e.csv"]
        (note,) = notes
        assert all(name in note for name in ("3 files", "notes.txt", "f.doc", "g.jsonl.lz4"))

    def test_links_lead_to_each_folder_once(self, tmp_path):
        (tmp_path / "in" / "a").mkdir(parents=True)
        (tmp_path / "other").mkdir()
        for name in ("in/a/a.jsonl", "other/b.jsonl"):
            (tmp_path / name).touch()
        (tmp_path / "in" / "a" / "up").symlink_to("..")
        for name in ("latest", "other"):
            (tmp_path / "in" / name).symlink_to(tmp_path / "other")
        found = [Path(path).relative_to(tmp_path / "in").as_posix() for path in expand_inputs([tmp_path / "in"])]
        assert found == ["a/a.jsonl", "latest/b.jsonl"]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.bad.jsonl"])
    def test_a_link_to_nothing(self, tmp_path, name):
        (tmp_path / name).symlink_to("nowhere")
        for entry in (tmp_path, tmp_path / "*"):
            with pytest.raises(UserError, match=rf"{name}: a link to a file that does not exist; remove it"):
                expand_inputs([entry])

    def test_a_folder_without_a_known_ending(self, tmp_path):
        (tmp_path / "g.jsonl.lz4").touch()
        with pytest.raises(UserError, match=r"lz4 -dc .*g\.jsonl\.lz4 \| megatron-cpt preprocess --input -"):
            expand_inputs([tmp_path])

    def test_output_inside_of_the_input(self, tmp_path):
        """One command resumes after an interruption, and never reads its own files."""
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 100) + b"{\n")

        def stop(*now):
            raise KeyboardInterrupt

        inputs, prefix = [tmp_path], tmp_path / "p"
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, prefix, tokenizer="byte", options=PreprocessOptions(block_bytes=500, progress=stop))
        assert (tmp_path / "p.preprocess").is_dir()
        assert preprocess(inputs, prefix, tokenizer="byte", options=PreprocessOptions(block_bytes=500)).bad_lines == 1
        assert (tmp_path / "p.json").exists()
        for again in (inputs, [tmp_path / "*"]):
            notes: list[str] = []
            options = PreprocessOptions(overwrite=True, notify=notes.append)
            assert preprocess(again, prefix, tokenizer="byte", options=options).lines == 401
            assert notes == []
        with pytest.raises(UserError, match=r"p\.bad\.jsonl: is a file that preprocess wrote"):
            expand_inputs([tmp_path / "p.bad.jsonl"])


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    """A single row group of 128 MB that does not pack: memory grows by far less."""
    import random

    rng = random.Random(0)
    texts = [rng.randbytes(2000).hex() for _ in range(32_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts), compression="none")
    code = (
        "import sys, resource\n"
        "from megatron_cpt.data.preprocess.inputs import BlockOptions, InputFiles, read_blocks\n"
        "import megatron_cpt.data.preprocess.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "blocks = read_blocks(InputFiles.of(sys.argv[1:]), BlockOptions(('text',)))\n"
        "rows = sum(block.end - block.position for block in blocks)\n"
        "print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    rows, grown = map(int, subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split())
    assert rows == 32_000
    assert grown < 110_000  # KiB: about 70,000; 188,000 when the column is read as a whole
