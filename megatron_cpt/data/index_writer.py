"""Writes megatron's `.bin`/`.idx` pair, byte for byte what megatron-core's `IndexedDatasetBuilder` writes.

Both files are written aside, forced to disk and only then renamed, the `.bin` first: whoever finds a `.idx` under the
final name finds a whole data set.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.durable import close_durably, sync_folder
from megatron_cpt.data.index_header import MAGIC, PREAMBLE, VERSION, dtype_code
from megatron_cpt.errors import UserError

_MAX_SEQUENCE = int(np.iinfo(np.int32).max)
_TABLE_BLOCK = 1 << 20  # entries of an index table made and written at a time
_BIN_BUFFER = 1 << 22  # bytes


class IndexedDatasetWriter:
    """Context manager that writes PREFIX.bin and PREFIX.idx, one sequence a document.

    On a clean exit the pair is published; on an exception, or if the process dies, nothing appears under the final
    names (an exception also removes the temporaries `PREFIX.bin.tmp-PID` and `PREFIX.idx.tmp-PID`).

    Args:
        prefix: path without `.bin` or `.idx`; its folder is made if missing.
        dtype: token type, for example `best_dtype(vocab_size)`.

    Raises:
        UserError: a token type or a token that the format cannot hold, or a folder that cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = dtype_code(self.dtype)
        self._temporary = {end: f"{self.prefix}.{end}.tmp-{os.getpid()}" for end in ("bin", "idx")}
        self._sizes = array("i")  # of all documents so far: 4 bytes each
        self._bin: IO[bytes] | None = None
        self.num_documents = 0
        self.num_tokens = 0

    def __enter__(self) -> IndexedDatasetWriter:
        try:
            os.makedirs(os.path.dirname(self.prefix) or ".", exist_ok=True)
            self._bin = open(self._temporary["bin"], "wb", buffering=_BIN_BUFFER)
        except OSError as error:
            raise UserError(f"{self.prefix}.bin: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._bin is not None
        try:
            if kind is None:
                close_durably(self._bin)
                self._write_index()
                self._publish()
        finally:  # after a success there is nothing left to remove
            self._bin.close()
            for path in self._temporary.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document (it may be empty)."""
        flat = np.asarray(tokens)
        self.add_documents(flat, [flat.size])

    def add_documents(self, flat_tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Appends many documents at once.

        Args:
            flat_tokens: the tokens of all of them, one after another.
            lengths: tokens of each; they add up to the number of tokens.
        """
        assert self._bin is not None, "the writer is used inside its `with` block"
        tokens, sizes = np.asarray(flat_tokens), np.asarray(lengths, dtype=np.int64)
        if int(sizes.sum()) != tokens.size or (sizes.size and int(sizes.min()) < 0):
            raise ValueError(f"{sizes.size} lengths that add up to {int(sizes.sum())} for {tokens.size} tokens")
        if sizes.size and int(sizes.max()) > _MAX_SEQUENCE:
            raise UserError(
                f"a document of {int(sizes.max())} tokens: the format holds at most {_MAX_SEQUENCE}; split it"
            )
        self._bin.write(self._cast(tokens).data)
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self.num_documents += sizes.size
        self.num_tokens += tokens.size

    def _cast(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The tokens in the file's type; numpy alone would wrap an id that does not fit into another one."""
        if tokens.size and tokens.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                bad = low if low < limits.min else high
                raise UserError(f"{self.prefix}.bin: token id {bad} does not fit {self.dtype.name}; use a wider type")
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def _write_index(self) -> None:
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        with open(self._temporary["idx"], "wb") as idx:
            idx.write(PREAMBLE.pack(MAGIC, VERSION, self._code, self.num_documents, self.num_documents + 1))
            for block in _blocks(self.num_documents):
                idx.write(sizes[block].astype("<i4").tobytes())
            pointer = 0
            for block in _blocks(self.num_documents):
                ends = pointer + np.cumsum(sizes[block], dtype=np.int64) * self.dtype.itemsize
                idx.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
                pointer = int(ends[-1])
            for block in _blocks(self.num_documents + 1):
                idx.write(np.arange(block.start, block.stop, dtype="<i8").tobytes())
            close_durably(idx)

    def _publish(self) -> None:
        # An older .idx goes first: at no moment may it stand beside the new .bin.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.prefix}.idx")
        os.replace(self._temporary["bin"], f"{self.prefix}.bin")
        os.replace(self._temporary["idx"], f"{self.prefix}.idx")
        sync_folder(Path(self.prefix).parent)


def _blocks(count: int) -> Iterator[slice]:
    """range(count) in pieces of a few megabytes, so that a table is never held twice."""
    for start in range(0, count, _TABLE_BLOCK):
        yield slice(start, min(start + _TABLE_BLOCK, count))
