"""Read parquet and Arrow files as blocks of rows, one batch of the wanted columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cpt.data.preprocess.tables import find_value
from megatron_cpt.errors import UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import DiskFile

_MAX_ROWS = 1 << 14
_READ_BYTES = 1 << 20  # a column is read in such pieces, not as a whole row group
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

RowCut = tuple[int, int, int, bytes, str | None]
"""Position, end, bytes_done, rows and damage of a `Block`."""


def cut_rows(
    path: str, extent: tuple[int, int], interval: tuple[int, int], keys: Sequence[str], block_bytes: int, begin: int
) -> Iterator[RowCut]:
    """Yield the blocks of a parquet file that begin at row `begin` or later.

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
        # without a buffer size, the column of a row group is read as a whole
        with DiskFile(path) as raw, pq.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            columns = [_find_column(path, file.schema_arrow, key) for key in keys]
            total = max(file.metadata.num_rows, 1)

            def place(row: int) -> int:
                return int(base + (extent[1] - base) * row // total)

            for group in range(file.metadata.num_row_groups):
                group_end = row + file.metadata.row_group(group).num_rows
                if group_end <= begin or place(group_end) < interval[0] or place(row) >= interval[1]:
                    row = group_end
                    continue
                for rows in _batches(file, group, columns, block_bytes):
                    end = row + rows.num_rows
                    if row >= begin and interval[0] <= place(row) < interval[1]:
                        yield row, end, place(end), _pack(rows), None
                    row = end
    except (pa.ArrowException, OSError) as error:
        _raise_disk_error(error)
        if row >= begin and (row > 0 or interval[0] <= base < interval[1]):
            yield row, row + 1, extent[1], b"", str(error).splitlines()[0]


def cut_batches(path: str, extent: tuple[int, int], keys: Sequence[str], block_bytes: int) -> Iterator[RowCut]:
    """Yield the blocks of an Arrow file or stream, such as Hugging Face's `datasets` writes.

    Raises:
        UserError: a key is not a column of the file.
    """
    row = 0
    try:
        # not a memory map: through one, a failing disk or a cut file kills the process
        with DiskFile(path) as raw, pa.PythonFile(raw, "r") as source:
            is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
            source.seek(max(0, source.size() - len(_STREAM_END)))
            is_complete = is_file or source.read() == _STREAM_END
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            tops = sorted({_find_column(path, reader.schema, key).split(".")[0] for key in keys})
            names = [name for name in reader.schema.names if name in {*keys, *tops}]
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            for batch in batches:
                wanted = batch.select(names)
                num_rows = min(_MAX_ROWS, max(1, block_bytes * wanted.num_rows // max(wanted.nbytes, 1)))
                for first in range(0, wanted.num_rows, num_rows):
                    rows = wanted.slice(first, num_rows)
                    done = extent[1] if is_file else min(extent[1], extent[0] + source.tell())
                    yield row, row + rows.num_rows, done, _pack(rows), None
                    row += rows.num_rows
            if not is_complete:
                raise pa.ArrowInvalid("the mark that ends an Arrow stream is missing")
    except (pa.ArrowException, OSError) as error:
        _raise_disk_error(error)
        yield row, row + 1, extent[1], b"", str(error).splitlines()[0]


def _raise_disk_error(error: Exception) -> None:
    """Raise errors of the disk; Arrow raises OSError without a number for damaged bytes, too."""
    if isinstance(error, OSError) and not is_path_error(error):
        raise error


def unpack_columns(rows: bytes, keys: Sequence[str]) -> list[list[Any]]:
    """Return the values of each key's column: None for a null, bytes for a text that is not UTF-8."""
    if not rows:
        return [[] for _ in keys]
    batch = pa.ipc.open_stream(rows).read_next_batch()
    return [_values(batch, key) for key in keys]


def _values(batch: Any, key: str) -> list[Any]:
    if key not in batch.schema.names:
        name, *parts = key.split(".")
        return [_part(row, parts) for row in batch.column(name)]
    column = batch.column(batch.schema.get_field_index(key))
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # one bad value fails the whole column; decode each value by itself
        values = column.cast(pa.large_binary()).to_pylist()
    return [_decoded(value) if type(value) is bytes else value for value in values]


def _part(row: Any, parts: Sequence[str]) -> Any:
    try:
        return find_value(row.as_py(), parts)
    except UnicodeDecodeError:
        return b""
    except LookupError:  # null or a shorter list
        return None


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _find_column(path: str, schema: Any, key: str) -> str:
    """Return the part of a key that names a column, or a field of one, as deep as lists allow.

    Example: `meta.text` of a struct column `meta` is read alone; of `parts.0.text` the whole list `parts` is read.

    Raises:
        UserError: there is no such column or field.
    """
    if key in schema.names:
        return key
    name, *parts = key.split(".")
    if name in schema.names:
        kind, column = schema.field(name).type, name
        for number, part in enumerate(parts):
            if pa.types.is_struct(kind) and kind.get_field_index(part) >= 0:
                kind = kind.field(part).type
                column += f".{part}" if number == column.count(".") else ""
            elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and part.isdigit():
                kind = kind.value_type
            else:
                raise UserError(f"input {path}: has no column {key!r}; {'.'.join([name, *parts[:number]])} is {kind}")
        if parts:
            return column
    known = ", ".join(map(repr, schema.names[:8])) or "none"
    raise UserError(f"input {path}: has no column {key!r}; its columns are {known}")


def _pack(batch: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _batches(file: Any, group: int, columns: Sequence[str], block_bytes: int) -> Iterator[Any]:
    """Yield record batches of a row group; the footer decides their size, so every reader cuts at the same rows."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    names = tuple(f"{column}." for column in columns)
    wanted = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(names))
    num_rows = min(_MAX_ROWS, max(1, block_bytes * metadata.num_rows // max(wanted, 1)))
    yield from file.iter_batches(num_rows, row_groups=[group], columns=list(columns), use_threads=False)
