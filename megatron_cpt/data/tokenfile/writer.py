"""Writer of Megatron's `.bin`/`.idx` pairs, byte for byte equal to megatron-core's `IndexedDatasetBuilder`.

All files are written under temporary names, flushed to disk and then renamed, the `.bin` first and the `.idx` last. So
if a `.idx` exists under its final name, the dataset is complete.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import MAGIC, PREAMBLE, VERSION, dtype_code
from megatron_cpt.data.tokenfile.numbers import NumberTable
from megatron_cpt.data.tokenfile.sidecar import Origin, describe_pair, is_free, sidecar_path
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import Rename, close_durably, publish_or_remove, write_atomically
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.output_path import output_problem
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import exists, open_writer

_MAX_SEQUENCE = int(np.iinfo(np.int32).max)
_TABLE_BLOCK = 1 << 20  # documents per block when the index tables are written
_LONGEST_ENDING = ".preprocess-1000-of-1000.lock"  # of names beside the output, which begin with a dot, too
_BIN_BUFFER = 1 << 22  # bytes


class IndexedDatasetWriter:
    """Context manager that writes PREFIX.bin and PREFIX.idx, with one sequence per document.

    The pair gets its final names when the block ends without an exception. After an exception, or if the process dies,
    no file has a final name (an exception also removes the temporary `PREFIX.bin.tmp-PID` and `PREFIX.idx.tmp-PID`).

    Example:
        >>> with IndexedDatasetWriter("data/web", best_dtype(vocab_size=257)) as writer:
        ...     writer.add_document([72, 105, 256])

    Args:
        prefix: path without `.bin` or `.idx`; a missing folder is created.
        dtype: token type, for example `best_dtype(vocab_size)`.
        origin: facts for the sidecar PREFIX.json; None: no sidecar.

    Raises:
        UserError: the format cannot store the token type or a token, or the folder is not writable.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike,
        *,
        origin: Origin | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = dtype_code(self.dtype)
        self._origin = origin if is_free(self.prefix) else None
        self._checksum = Checksum()
        self._temporary = {end: f"{self.prefix}.{end}.tmp-{os.getpid()}" for end in ("bin", "json", "idx")}
        self._sizes = array("i")  # tokens per document; an array takes 4 bytes per entry
        self._bin: IO[bytes] | None = None
        self.num_documents = 0
        self.num_tokens = 0

    def __enter__(self) -> Self:
        try:
            os.makedirs(os.path.dirname(self.prefix) or ".", exist_ok=True)
            self._bin = open_writer(self._temporary["bin"], buffer_bytes=_BIN_BUFFER)
        except OSError as error:
            if not is_path_error(error):
                raise
            raise UserError(f"{self.prefix}.bin: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, *error: object) -> None:
        assert self._bin is not None
        try:
            if error[0] is None and not self._bin.closed:  # `finish` closes it
                publish_or_remove(self.finish())
        finally:  # after a success the temporary files no longer exist
            for path in self._temporary.values():
                Path(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # on a full disk, closing writes the buffer and fails once more
                self._bin.close()

    def finish(self) -> list[Rename]:
        """Complete the files, and return the renames that publish them; the caller makes them inside the block.

        For pairs that are published together, or recorded before. Without this call the end of the block publishes.
        """
        assert self._bin is not None, "the writer is used inside its `with` block"
        close_durably(self._bin)
        self._write_index()
        self._write_sidecar()
        return [(path, f"{self.prefix}.{end}") for end, path in self._temporary.items()]

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append a document; it may be empty."""
        flat = np.asarray(tokens)
        self.add_documents(flat, [flat.size])

    def add_documents(self, flat_tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append many documents: their concatenated tokens, and the number of tokens of each document."""
        assert self._bin is not None, "the writer is used inside its `with` block"
        tokens, sizes = np.asarray(flat_tokens), np.asarray(lengths, dtype=np.int64)
        if int(sizes.sum()) != tokens.size or (sizes.size and int(sizes.min()) < 0):
            raise ValueError(f"{sizes.size} lengths that add up to {int(sizes.sum())} for {tokens.size} tokens")
        if sizes.size and int(sizes.max()) > _MAX_SEQUENCE:
            raise UserError(
                f"a document of {int(sizes.max())} tokens: the format allows at most {_MAX_SEQUENCE}; split it"
            )
        self._write_tokens(self._cast(tokens).data)
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self.num_documents += sizes.size
        self.num_tokens += tokens.size

    def _cast(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Convert tokens to the file's type, and refuse an id that does not fit: numpy would wrap it silently."""
        if tokens.size and tokens.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            for extreme in (int(tokens.min()), int(tokens.max())):
                if not limits.min <= extreme <= limits.max:
                    raise UserError(
                        f"{self.prefix}.bin: token id {extreme} does not fit {self.dtype.name}; use a wider type"
                    )
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def _write_tokens(self, content: memoryview | bytes) -> None:
        """Append bytes to the `.bin`."""
        assert self._bin is not None
        self._bin.write(content)
        if self._origin is not None:
            self._checksum.update(content)

    def _write_sidecar(self) -> None:
        """Write the sidecar, or remove the sidecar of the dataset that is replaced."""
        if self._origin is not None:
            sidecar = describe_pair(
                self._temporary["bin"],
                self._temporary["idx"],
                self._origin,
                bin_checksum=self._checksum.hexdigest(),
            )
            write_atomically(Path(self._temporary["json"]), sidecar.to_json())
        elif is_free(self.prefix):
            Path(sidecar_path(self.prefix)).unlink(missing_ok=True)

    def _write_index(self) -> None:
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        write_index(self._temporary["idx"], sizes, self.dtype, empty_sequences=True)


def write_index(
    path: str, sizes: npt.NDArray[np.int32] | NumberTable, dtype: np.dtype[Any], *, empty_sequences: bool
) -> None:
    """Write the `.idx` of documents with one sequence each, and flush it to disk.

    Args:
        sizes: (num_documents,), tokens per document; may be in a file, because it is read in blocks.
        empty_sequences: give a document without tokens an empty sequence, as the builder's `add_document` does; if
            False, no sequence, as in Megatron-LM's `preprocess_data.py`.
    """
    blocks = [slice(at, at + _TABLE_BLOCK) for at in range(0, len(sizes), _TABLE_BLOCK)]

    def sequences(block: slice) -> npt.NDArray[np.int32]:
        piece = sizes[block].astype("<i4")
        return piece if empty_sequences else piece[piece > 0]

    num_sequences = sum(sequences(block).size for block in blocks)
    with open_writer(path) as idx:
        idx.write(PREAMBLE.pack(MAGIC, VERSION, dtype_code(dtype), num_sequences, len(sizes) + 1))
        for block in blocks:
            idx.write(sequences(block).tobytes())
        pointer = 0
        for block in blocks:
            num_bytes = sequences(block).astype("<i8") * dtype.itemsize
            ends = pointer + np.cumsum(num_bytes)
            idx.write((ends - num_bytes).astype("<i8").tobytes())
            pointer = int(ends[-1]) if ends.size else pointer
        idx.write(np.zeros(1, "<i8").tobytes())
        sequence = 0
        for block in blocks:
            ends = sequence + np.cumsum((sizes[block] > 0) | empty_sequences, dtype=np.int64)
            idx.write(ends.astype("<i8").tobytes())
            sequence = int(ends[-1])
        close_durably(idx)


def require_free(output_prefix: str, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Check that an output is none of the inputs, and does not exist unless `overwrite` is set.

    Raises:
        UserError: the output may not be written.
    """
    require_file_name(output_prefix)
    existing = [f"{output_prefix}{end}" for end in (".bin", ".idx") if exists(f"{output_prefix}{end}")]
    if any(os.path.realpath(f"{output_prefix}.bin") == os.path.realpath(f"{prefix}.bin") for prefix in inputs):
        raise UserError(f"{output_prefix}: is an input too; choose another output")
    if existing and not overwrite:
        raise UserError(f"{' and '.join(existing)}: exists already; choose another output, or replace it: --overwrite")


def require_file_name(output_prefix: str) -> None:
    """Raise a UserError for a prefix whose files could not be written, before anything is read.

    Also for one such as `io/`, which would give the hidden files `io/.bin` and `io/.idx`.
    """
    if os.path.basename(output_prefix) in ("", ".", ".."):
        raise UserError(
            f"output prefix {output_prefix!r}: has no file name, so its files would be hidden; give a path such as "
            f"{os.path.join(os.path.dirname(output_prefix) or 'data', 'web')}"
        )
    if problem := output_problem(output_prefix, ending=_LONGEST_ENDING):
        raise UserError(f"output prefix {output_prefix}: {problem}")
