"""Writes megatron's `.bin`/`.idx` pair, byte for byte what megatron-core's `IndexedDatasetBuilder` writes.

Both files are written aside, forced to disk and only then renamed, the `.bin` first: whoever finds a `.idx` under the
final name finds a whole data set.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import MAGIC, PREAMBLE, VERSION, dtype_code
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import close_durably, publish

_MAX_SEQUENCE = int(np.iinfo(np.int32).max)
_TABLE_BLOCK = 1 << 20  # documents whose entries are made and written at a time
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
                publish([(self._temporary[end], f"{self.prefix}.{end}") for end in ("bin", "idx")])
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
        write_index(self._temporary["idx"], sizes, self.dtype, empty_sequences=True)


def write_index(path: str, sizes: npt.NDArray[np.int32], dtype: np.dtype[Any], *, empty_sequences: bool) -> None:
    """Writes the `.idx` of documents of one sequence each, and forces it to disk.

    Args:
        path: of the `.idx`.
        sizes: tokens of each document, (num_documents,); may be a memory map, and is read in pieces.
        dtype: token type.
        empty_sequences: whether a document without tokens has a sequence of none, as the builder's `add_document`
            makes it, or no sequence at all, as Megatron-LM's `preprocess_data.py` makes it.
    """
    blocks = [slice(at, at + _TABLE_BLOCK) for at in range(0, len(sizes), _TABLE_BLOCK)]

    def sequences(block: slice) -> npt.NDArray[np.int32]:
        piece = sizes[block].astype("<i4")
        return piece if empty_sequences else piece[piece > 0]

    num_sequences = sum(sequences(block).size for block in blocks)
    with open(path, "wb") as idx:
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
