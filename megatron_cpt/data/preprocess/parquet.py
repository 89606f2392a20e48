"""Read parquet and Arrow files as blocks of rows, one batch of the wanted columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_cpt.data.preprocess.tables import find_value
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import DiskFile

_MAX_ROWS = 1 << 14
_READ_BYTES = 1 << 20  # a column is read in such pieces, not as a whole row group
_MAX_DECODED_BYTES = 1 << 28  # of one read, if every row refers to the longest value that there can be
_MAX_DICTIONARY_BYTES = 1 << 28  # writers end a dictionary at about 1 MB
_PAGE_HEADER_BYTES = 16  # more than its first two fields take
_DICTIONARY_PAGE = 2
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

RowCut = tuple[int, int, int, bytes, str | None]
"""Position, end, bytes_done, rows and damage of a `Block`."""


def cut_rows(
    path: str, extent: tuple[int, int], interval: tuple[int, int], keys: Sequence[str], block_bytes: int, begin: int
) -> Iterator[RowCut]:
    """Yield the blocks of a parquet file that begin at row `begin` or later.

    Row groups are read one after another, in batches of about `block_bytes` decoded bytes. Row r of n counts as lying
    at byte r/n of the file. If the footer or a page cannot be read, the last block carries the error.

    Args:
        extent: first and last byte of the file when all files are laid end to end.
        interval: the bytes of all files, laid end to end, in which blocks must begin.
        begin: the first row to read.

    Raises:
        UserError: a key is not a column of the file.
        RefusedError: a dictionary of a column is too large to be decoded.
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
                for rows in _batches(path, raw, file, group, columns, block_bytes):
                    end = row + rows.num_rows
                    if row < begin < end:  # the run began with another version, which cut at other rows
                        rows, row = rows.slice(begin - row), begin
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
                for rows in _slices(pa.Table.from_batches([batch.select(names)]), block_bytes):
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
    table = pa.ipc.open_stream(rows).read_all()
    return [_values(table, key) for key in keys]


def _values(table: Any, key: str) -> list[Any]:
    if key not in table.schema.names:
        name, *parts = key.split(".")
        return [_part(row, parts) for row in table.column(name)]
    column = table.column(table.schema.get_field_index(key))
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


def _pack(rows: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return bytes(sink.getvalue().to_pybytes())


def _batches(
    path: str, raw: DiskFile, file: Any, group: int, columns: Sequence[str], block_bytes: int
) -> Iterator[Any]:
    """Yield tables of the rows of a row group; the file alone decides their size, so every reader cuts the same rows.

    Values that occur often are stored once, in a dictionary, so the size in the footer is no bound. Example: a
    dictionary of one text of 1 MB and 16,384 references take 300 bytes in the file and 16 GB in memory. So a read has
    so few rows that it stays small even if each row refers to the longest text, and small reads are joined.
    """
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    names = tuple(f"{column}." for column in columns)
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(names)]
    stored = sum(chunk.total_uncompressed_size for chunk in chunks)
    num_rows = min(_MAX_ROWS, max(1, block_bytes * metadata.num_rows // max(stored, 1)))
    longest = 0
    for chunk in chunks:
        values_per_row = -(-chunk.num_values // max(metadata.num_rows, 1))
        longest += values_per_row * _longest_repeated(f"input {path}: row group {group}", raw, chunk)
    num_read = min(num_rows, max(1, _MAX_DECODED_BYTES // max(longest, 1)))
    pending, num_pending, num_bytes = list[Any](), 0, 0
    for batch in file.iter_batches(num_read, row_groups=[group], columns=list(columns), use_threads=False):
        pending.append(batch)
        num_pending += batch.num_rows
        num_bytes += sum(map(_decoded_bytes, batch.columns))
        if num_pending + num_read > num_rows or num_bytes >= block_bytes:
            yield from _slices(pa.Table.from_batches(pending), 2 * block_bytes)
            pending, num_pending, num_bytes = [], 0, 0
    if pending:
        yield from _slices(pa.Table.from_batches(pending), 2 * block_bytes)


def _longest_repeated(place: str, raw: DiskFile, chunk: Any) -> int:
    """Return a bound for the bytes of a value of a column that takes less room in the file than in memory."""
    if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a value is a part of the previous one and some more bytes
        return int(chunk.total_uncompressed_size)
    first_page = chunk.dictionary_page_offset or chunk.data_page_offset
    kind, size = _page_header(raw.read_at(min(first_page, chunk.data_page_offset), _PAGE_HEADER_BYTES))
    if kind != _DICTIONARY_PAGE:
        return 0
    if size > _MAX_DICTIONARY_BYTES:
        raise RefusedError(
            f"{place}: column {chunk.path_in_schema!r} has a dictionary of {size:,} bytes, above the limit of "
            f"{_MAX_DICTIONARY_BYTES:,}; write the file again without dictionaries (use_dictionary=False of pyarrow)"
        )
    return size


def _page_header(data: bytes) -> tuple[int, int]:
    """Return kind and unpacked size of a page, the first two fields of its header in Thrift's compact protocol.

    Each is a byte 0x15 (next field, a 32-bit integer) and a zigzag number of 7 bits per byte. Example: 15 04 15 88 01
    is kind 2 (04) and a size of 68 bytes (88 01 is 136).
    """
    values, position = [0, 0], 0
    for number in range(2):
        position, shift, more = position + 1, 0, True
        while more and position < len(data):
            values[number] |= (data[position] & 0x7F) << shift
            more, position, shift = data[position] > 0x7F, position + 1, shift + 7
    return values[0] >> 1, values[1] >> 1


def _decoded_bytes(column: Any) -> int:
    """Return the size of a column if each row had its own copy of its value."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    pieces = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if column.type.value_type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return sum(len(piece) * piece.dictionary.nbytes for piece in pieces)
    return sum(pc.sum(pc.binary_length(piece.dictionary).take(piece.indices)).as_py() or 0 for piece in pieces)


def _slices(table: Any, block_bytes: int) -> Iterator[Any]:
    """Yield tables of at most `_MAX_ROWS` rows and about `block_bytes` decoded bytes."""
    size = sum(map(_decoded_bytes, table.columns))
    num_rows = min(_MAX_ROWS, max(1, block_bytes * table.num_rows // max(size, 1)))
    for first in range(0, table.num_rows, num_rows):
        yield table.slice(first, num_rows)
