"""Blocks: every line exactly once, cut at the same places and numbered correctly by every reader."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.data.preprocess.inputs import (
    BlockOptions,
    Cursor,
    InputFiles,
    Shard,
    expand_inputs,
    lines_before,
    parse_shard,
    read_blocks,
)
from megatron_cpt.data.preprocess.parse import parse_block
from megatron_cpt.errors import UserError

TEXTS = [f"{i} " + "x" * (i * 37 % 90) for i in range(200)]


def write_inputs(folder: Path) -> list[Path]:
    """Write lines of many lengths, blank lines and a last line without an end, in each kind of file."""
    lines = [json.dumps({"text": text}) + "\n" * (1 + i % 3) for i, text in enumerate(TEXTS)]
    data = "".join(lines).removesuffix("\n").encode()
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "c.jsonl").write_bytes(data)
    pq.write_table(pa.table({"id": range(200), "text": TEXTS}), folder / "d.parquet", row_group_size=30)
    (folder / "empty.jsonl").touch()
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "empty.jsonl", "d.parquet")]


def texts_of(blocks, options) -> list[str]:
    return [text for block in blocks for text in parse_block(block, options).texts[0]]


@pytest.mark.parametrize("block_bytes", [5, 64, 1000, 10**6])
def test_every_line_once_in_order(tmp_path, block_bytes):
    options = BlockOptions(("text",), block_bytes)
    files = InputFiles.of(expand_inputs(write_inputs(tmp_path)))
    blocks = list(read_blocks(files, options))
    assert texts_of(blocks, options) == TEXTS * 4
    assert [block.bytes_done for block in blocks] == sorted(block.bytes_done for block in blocks)
    assert blocks[-1].bytes_done == files.total_bytes


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_shards_in_order_are_the_whole(tmp_path, count):
    options = BlockOptions(("text",), 256)
    files = InputFiles.of(expand_inputs(write_inputs(tmp_path)))
    parts = [list(read_blocks(files, options, Shard(index, count))) for index in range(count)]
    assert [block for part in parts for block in part] == list(read_blocks(files, options))
    if count == 2:
        assert all(parts)


def test_every_block_is_a_place_to_go_on(tmp_path):
    options = BlockOptions(("text",), 300)
    files = InputFiles.of(expand_inputs(write_inputs(tmp_path)))
    shard = Shard(1, 3)
    blocks = list(read_blocks(files, options, shard))
    assert len(blocks) > 5
    for number, block in enumerate(blocks):
        assert list(read_blocks(files, options, shard, block.next_cursor)) == blocks[number + 1 :]
    assert list(read_blocks(files, options, shard, Cursor())) == blocks


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("block_bytes", [5, 50, 10**6])
def test_lines_are_numbered_from_the_beginning_of_their_file(tmp_path, name, block_bytes):
    data = b"".join(b'{"text": "good"}\n' if i % 3 else b"bad %d\n\n" % i for i in range(60)) + b"bad at the end"
    wrong = [number for number, line in enumerate(data.split(b"\n"), 1) if line.startswith(b"bad")]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    files, options = InputFiles.of([str(tmp_path / name)]), BlockOptions(("text",), block_bytes)
    before, found = 0, []
    for block in read_blocks(files, options):
        parsed = parse_block(block, options)
        if not name.endswith("gz"):
            assert lines_before(block, options) == before
        found += [before + bad.line for bad in parsed.bad_lines]
        before += parsed.num_ends
    assert found == wrong


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_line_that_is_too_long_is_left_out_and_named(tmp_path, name, where):
    lines = [json.dumps({"text": text}).encode() for text in ("one", "two", "three")]
    place = {"first": 0, "middle": 1, "last": 3}[where]
    lines.insert(place, json.dumps({"text": "y" * 3_000_000}).encode())
    data = b"\n".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    files, options = InputFiles.of([str(tmp_path / name)]), BlockOptions(("text",), 1000, max_line_bytes=100_000)
    parsed, before = [], 0
    bad = []
    for block in read_blocks(files, options):
        parsed.append(parse_block(block, options))
        assert block.lines is None or len(block.lines.data) <= 2_000_000
        bad += [(before + line.line, line.reason) for line in parsed[-1].bad_lines]
        before += parsed[-1].num_ends
    assert [text for block in parsed for text in block.texts[0]] == ["one", "two", "three"]
    assert bad == [(place + 1, "longer than 100,000 bytes")]


class TestParquet:
    def read(self, path, options, start=None):
        return list(read_blocks(InputFiles.of([str(path)]), options, None, start))

    def test_nulls_numbers_and_bytes(self, tmp_path):
        values = pa.array([b"good", None, b"caf\xe9", b"end"], pa.binary())
        pq.write_table(pa.table({"text": values, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
        options = BlockOptions(("text",))
        (block,) = self.read(tmp_path / "a.parquet", options)
        parsed = parse_block(block, options)
        assert parsed.texts == [["good", "end"]]
        assert [(bad.line, bad.reason) for bad in parsed.bad_lines] == [
            (2, "the value of 'text' is not a string, but NoneType"),
            (3, "the value of 'text' is not UTF-8"),
        ]

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    def test_kinds_of_text_columns(self, tmp_path, kind):
        pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
        options = BlockOptions(("text",), 500)
        assert texts_of(self.read(tmp_path / "a.parquet", options), options) == TEXTS

    def test_a_cut_file_is_damage(self, tmp_path):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
        options = BlockOptions(("text",))
        (block,) = self.read(tmp_path / "a.parquet", options)
        assert block.damage.startswith("Parquet magic bytes not found")
        assert self.read(tmp_path / "a.parquet", options, block.next_cursor) == []

    def test_no_such_column(self, tmp_path):
        pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet: has no column 'text'; its columns are 'body'"):
            self.read(tmp_path / "a.parquet", BlockOptions(("text",)))


def test_folders_are_read_sorted_and_deep(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "sub/a.json.zst", "a.parquet", "notes.txt"):
        (tmp_path / name).touch()
    found = [Path(path).relative_to(tmp_path).as_posix() for path in expand_inputs([tmp_path])]
    assert found == ["a.parquet", "b.jsonl", "sub/a.json.zst"]


class TestShard:
    @pytest.mark.parametrize(("text", "shard"), [("0/1", Shard(0, 1)), ("3/4", Shard(3, 4))])
    def test_written(self, text, shard):
        assert parse_shard(text, {}) == shard

    @pytest.mark.parametrize(
        ("text", "says"), [("4/4", "the last one of 4 is 3/4"), ("a", "give i/n"), ("-1/2", "i/n")]
    )
    def test_mistakes(self, text, says):
        with pytest.raises(UserError, match=says):
            parse_shard(text, {})

    def test_tasks_of_srun(self):
        assert parse_shard("slurm", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}) == Shard(3, 8)

    @pytest.mark.parametrize("task", [5, 7, 9])
    def test_array_job(self, task):
        names = {"ID": task, "MIN": 5, "MAX": 9, "COUNT": 3}
        environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}
        assert parse_shard("slurm", environment | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == Shard(
            (task - 5) // 2, 3
        )

    def test_outside_slurm(self):
        with pytest.raises(UserError, match="SLURM_PROCID is not set"):
            parse_shard("slurm", {})
