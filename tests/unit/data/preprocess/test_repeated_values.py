"""A text that is stored once and repeated many times is read in bounded memory, with every repetition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.data.preprocess import parquet
from megatron_cpt.data.preprocess.inputs import BlockOptions, Cursor, InputFiles, read_blocks
from megatron_cpt.data.preprocess.parse import parse_block
from megatron_cpt.errors import RefusedError

NUM_ROWS = 20_000
LIMIT = 3 << 30


def write(path: Path, kind: str, texts: list[str], indices: list[int]) -> None:
    """Write rows of the texts that the indices name."""
    references = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(texts))
    table = pa.table({"text": references})
    if kind == "dictionary":
        pq.write_table(table, path, compression="zstd", store_schema=False)
    elif kind == "dictionary in the schema":
        pq.write_table(table, path, compression="zstd")
    elif kind == "differences":
        plain = pa.table({"text": references.cast(pa.string())})
        encoding = {"text": "DELTA_BYTE_ARRAY"}
        pq.write_table(plain, path, compression="zstd", use_dictionary=False, column_encoding=encoding)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)


def read(path: Path, start: int = 0) -> list[str]:
    options = BlockOptions(("text",), block_bytes=4096)
    blocks = read_blocks(InputFiles.of([str(path)]), options, start=Cursor(0, start))
    return [text for block in blocks for text in parse_block(block, options).texts[0]]


KINDS = {"dictionary": "a.parquet", "dictionary in the schema": "a.parquet", "differences": "a.parquet", "x": "a.arrow"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_comes_once_from_any_row_on(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parquet, "_MAX_DECODED_BYTES", 1 << 14)
    texts = ["a" * 3000, "b", "", "ü" * 700, "c" * 5000]
    indices = [number * number % 5 for number in range(400)] + [1] * 3000
    path = tmp_path / KINDS[kind]
    write(path, kind, texts, indices)
    expected = [texts[number] for number in indices]
    assert read(path) == expected
    if path.suffix == ".parquet":  # any row, because another version may have cut elsewhere
        assert all(read(path, start) == expected[start:] for start in (1, 37, 399, 401, 2000))


@pytest.mark.parametrize("kind", ["dictionary", "dictionary in the schema", "x"])
def test_a_small_file_of_many_gigabytes(tmp_path, kind):
    path = tmp_path / KINDS[kind]
    write(path, kind, ["a" * (1 << 20)], [0] * NUM_ROWS)
    assert os.path.getsize(path) < 2 << 20
    code = (
        "import resource, sys\nfrom itertools import islice\n"
        "from megatron_cpt.data.preprocess.inputs import BlockOptions, InputFiles, read_blocks\n"
        "from megatron_cpt.data.preprocess.parse import parse_block\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))\noptions = BlockOptions(('text',))\n"
        "for block in islice(read_blocks(InputFiles.of([sys.argv[1]]), options), 20):\n"
        "    texts = parse_block(block, options).texts[0]\n"
        "    assert len(texts) == block.end - block.position and set(texts) == {'a' * (1 << 20)}\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_dictionary_that_is_too_large_names_file_and_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_MAX_DICTIONARY_BYTES", 4000)
    write(tmp_path / "a.parquet", "dictionary", ["a" * 5000], [0] * 10)
    with pytest.raises(RefusedError, match=r"a\.parquet: row group 0: column 'text' has a dictionary of 5,004 bytes"):
        read(tmp_path / "a.parquet")
