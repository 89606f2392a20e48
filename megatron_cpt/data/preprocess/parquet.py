"""Read parquet files as blocks of rows, one batch of the wanted columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cpt.errors import UserError

_MAX_ROWS = 1 << 14


def cut_rows(
    path: str, extent: tuple[int, int], interval: tuple[int, int], keys: Sequence[str], block_bytes: int, begin: int
) -> Iterator[tuple[int, int, int, bytes, str | None]]:
    """Yield position, end, bytes_done, rows and damage of the `Block`s that begin at row `begin` or later.

    Row groups are read one after another, in batches of about `block_bytes` unpacked bytes. Row r of n counts as lying
    at byte r/n of the file. If the footer or a page cannot be read, the last block carries the error.

    Args:
        extent: first and last byte of the file when all files are laid end to end.
        interval: the bytes of all files, laid end to end, in which blocks must begin.
        begin: the first row to read.

    Raises:
        UserError: a key is not a column of the file.
    """
    base, row = extent[0], 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [key for key in keys if key not in names]:
                known = ", ".join(map(repr, names[:8])) or "none"
                raise UserError(f"input {path}: has no column {missing[0]!r}; its columns are {known}")
            total = max(file.metadata.num_rows, 1)

            def place(row: int) -> int:
                return int(base + (extent[1] - base) * row // total)

            for group in range(file.metadata.num_row_groups):
                group_end = row + file.metadata.row_group(group).num_rows
                if group_end <= begin or place(group_end) < interval[0] or place(row) >= interval[1]:
                    row = group_end
                    continue
                for rows in _batches(file, group, keys, block_bytes):
                    end = row + rows.num_rows
                    if row >= begin and interval[0] <= place(row) < interval[1]:
                        yield row, end, place(end), _pack(rows), None
                    row = end
    except (pa.ArrowException, OSError) as error:
        damage = f"the file is truncated or corrupt: {str(error).splitlines()[0]}"
        if row >= begin and (row > 0 or interval[0] <= base < interval[1]):
            yield row, row + 1, extent[1], b"", damage


def unpack_columns(rows: bytes, keys: Sequence[str]) -> list[list[Any]]:
    """Return the values of each key's column: None for a null, bytes for a text that is not UTF-8."""
    if not rows:
        return [[] for _ in keys]
    batch = pa.ipc.open_stream(rows).read_next_batch()
    return [_values(batch.column(batch.schema.get_field_index(key))) for key in keys]


def _values(column: Any) -> list[Any]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # one bad value fails the whole column; decode each value by itself
        values = column.cast(pa.large_binary()).to_pylist()
    return [_decoded(value) if type(value) is bytes else value for value in values]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _pack(batch: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _batches(file: Any, group: int, keys: Sequence[str], block_bytes: int) -> Iterator[Any]:
    """Yield record batches of a row group; the footer decides their size, so every reader cuts at the same rows."""
    metadata = file.metadata.row_group(group)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    wanted = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in keys)
    num_rows = min(_MAX_ROWS, max(1, block_bytes * metadata.num_rows // max(wanted, 1)))
    yield from file.iter_batches(num_rows, row_groups=[group], columns=list(keys), use_threads=False)
