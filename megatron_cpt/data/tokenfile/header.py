"""Header of a `.idx` file. It has all that is needed to plan and start a run, and is read in a few small reads.

Layout of a `.idx` (megatron-core `datasets/indexed_dataset.py`, version 1; everything little-endian):

    9 bytes    b"MMIDIDX\\0\\0"
    uint64     version (1)
    uint8      code of the token type
    uint64     S: number of sequences
    uint64     D: number of document boundaries, one more than the number of documents
    int32[S]   tokens of each sequence
    int64[S]   offset of each sequence in the `.bin`, in bytes
    int64[D]   first sequence of each document; the last entry is S
    int8[S]    mode of each sequence, only in multimodal datasets

The `.bin` contains the tokens of all sequences, one after another, and nothing else.

Example: documents [7, 8, 9] and [5] as uint16, one sequence each: S = 2, D = 3, lengths 3 1, offsets 0 6, first
sequences 0 1 2. The `.bin` has 8 bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import FileIdentity, check_unchanged
from megatron_cpt.files.remote import RangeFile, is_file, open_ranges
from megatron_cpt.files.retry import is_path_error

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
PREAMBLE = struct.Struct("<9sQBQQ")
_START_BYTES = 4096  # read at once: a page, which is the whole `.idx` of a dataset of few documents

# megatron-core's `DType` enumeration. Always little-endian, so that every machine reads the same tokens.
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}

LIST_ENDING = ".docs"  # of document lists, see `document_list.py`

_DTYPE_NAMES = ", ".join(dtype.name for dtype in DTYPE_CODES.values())
_FIX = "copy the .bin/.idx pair again from an intact source, or build it again with `megatron-cpt preprocess`"


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """Header of a dataset, from the first bytes of its `.idx` and the sizes of both files.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        num_sequences: number of sequences; a document has one or more.
        has_modes: the dataset is multimodal: its index has a mode per sequence.
        identities: of the `.bin` and the `.idx` whose header this is; None for files in an object store.
    """

    prefix: str
    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int
    num_tokens: int
    has_modes: bool = False
    identities: tuple[FileIdentity | None, FileIdentity | None] = field(default=(None, None), compare=False, repr=False)

    def check_unchanged(self) -> None:
        """Compare both files with the ones that were opened.

        Raises:
            ChangedFileError: a file was replaced, written to or removed.
        """
        check_unchanged(identity for identity in self.identities if identity is not None)

    @property
    def sizes_offset(self) -> int:
        """Byte offset of the sequence sizes in the `.idx`."""
        return PREAMBLE.size

    @property
    def pointers_offset(self) -> int:
        """Byte offset of the sequence pointers in the `.idx`."""
        return self.sizes_offset + 4 * self.num_sequences

    @property
    def documents_offset(self) -> int:
        """Byte offset of the document boundaries in the `.idx`."""
        return self.pointers_offset + 8 * self.num_sequences

    @property
    def modes_offset(self) -> int:
        """Byte offset of the modes, or of the end of the file if it has none."""
        return self.documents_offset + 8 * (self.num_documents + 1)


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the token type that Megatron uses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return DTYPE_CODES[8] if vocab_size < 65500 else DTYPE_CODES[4]


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the code of a token type in the file.

    Raises:
        UserError: Megatron's format does not have the token type.
    """
    for code, known in DTYPE_CODES.items():
        if known == dtype:
            return code
    raise UserError(f"token type {dtype} cannot be stored in a .bin/.idx; choose one of {_DTYPE_NAMES}")


def read_header(prefix: str | os.PathLike[str]) -> IndexHeader:
    """Read the header of PREFIX.idx, and check that its tables and PREFIX.bin have the sizes it implies.

    Reads the preamble, the first and last entries of the tables and two file sizes, regardless of the size of the data.

    Raises:
        UserError: a file is missing or not readable.
        RefusedError: a file is truncated, has another format, or the two files do not belong together.
    """
    prefix = os.fspath(prefix)
    if prefix.endswith(LIST_ENDING):
        raise UserError(f"{prefix}: a document list cannot be used here; give prefixes of .bin/.idx")
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    try:
        with open_ranges(idx_path) as idx, open_ranges(bin_path) as tokens:
            start = idx.read(0, _START_BYTES)

            def read(offset: int, count: int) -> bytes:
                end = offset + count
                return start[offset:end] if end <= len(start) else idx.read(offset, count)

            header = _read_preamble(prefix, start, idx, tokens)
            _check_ends(read, header, idx_path, bin_path)
            return header
    except OSError as error:
        if not is_path_error(error):
            raise
        missing = [path for path in (idx_path, bin_path) if not is_file(path)]
        if missing:
            found = f"no such file: {' and '.join(missing)}"
            raise UserError(f"{found}; a dataset is a pair PREFIX.bin and PREFIX.idx") from None
        path = error.filename or idx_path
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def refuse(path: str, problem: str) -> RefusedError:
    """Build the error for a damaged file: its path, the problem, and what to do."""
    return RefusedError(f"{path}: {problem}; {_FIX}")


def _read_preamble(prefix: str, start: bytes, idx: RangeFile, tokens: RangeFile) -> IndexHeader:
    idx_path, identities = f"{prefix}.idx", (tokens.identity(), idx.identity())
    bin_bytes, idx_bytes = (
        file.size if identity is None else identity.num_bytes
        for file, identity in zip((tokens, idx), identities, strict=True)
    )
    if len(start) < PREAMBLE.size:
        raise refuse(idx_path, f"has {len(start)} bytes, fewer than the {PREAMBLE.size} of a header")
    magic, version, code, num_sequences, num_boundaries = PREAMBLE.unpack_from(start)
    if magic != MAGIC:
        raise refuse(idx_path, f"is not a megatron index: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise refuse(idx_path, f"has version {version}; only version {VERSION} is known")
    if code not in DTYPE_CODES:
        raise refuse(idx_path, f"has the unknown token type code {code}; known are 1 to 8 ({_DTYPE_NAMES})")
    if num_boundaries < 1:
        raise refuse(idx_path, "has no document boundaries; even an empty dataset has one")
    dtype = DTYPE_CODES[code]
    if bin_bytes % dtype.itemsize:
        raise refuse(
            f"{prefix}.bin", f"has {bin_bytes} bytes, no whole number of {dtype.name} tokens: it was truncated"
        )
    header = IndexHeader(
        prefix=prefix,
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=num_boundaries - 1,
        num_tokens=bin_bytes // dtype.itemsize,
        # 4 bytes for the size of a sequence, 8 for its offset, 1 for its mode
        has_modes=num_sequences > 0 and idx_bytes == PREAMBLE.size + (4 + 8 + 1) * num_sequences + 8 * num_boundaries,
        identities=identities,
    )
    with_modes = header.modes_offset + num_sequences
    if idx_bytes not in (header.modes_offset, with_modes):
        raise refuse(
            idx_path,
            f"has {idx_bytes} bytes, but {num_sequences} sequences and {num_boundaries - 1} documents take "
            f"{header.modes_offset} (or {with_modes} with modes): it was truncated or is damaged",
        )
    return header


def _check_ends(read: Callable[[int, int], bytes], header: IndexHeader, idx_path: str, bin_path: str) -> None:
    """Check that the first and last table entries are consistent and end exactly at the end of the `.bin`."""
    count, sizes_offset, pointers_offset = header.num_sequences, header.sizes_offset, header.pointers_offset
    (last_boundary,) = struct.unpack("<q", read(header.modes_offset - 8, 8))
    if last_boundary != count:
        raise refuse(idx_path, f"ends its last document at sequence {last_boundary} of {count}")
    end, number = 0, min(2, count)
    # a wrong token type makes every pointer wrong, so the first and last two entries reveal it
    for first in sorted({0, count - number}) if count else []:
        sizes = struct.unpack(f"<{number}i", read(sizes_offset + 4 * first, 4 * number))
        starts = struct.unpack(f"<{number}q", read(pointers_offset + 8 * first, 8 * number))
        for place, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            sequence, after = first + place, starts[place + 1 :]
            end = start + size * header.dtype.itemsize
            if size < 0 or start < 0 or (sequence == 0 and start) or after not in ((), (end,)):
                raise refuse(
                    idx_path,
                    f"gives sequence {sequence} {size} {header.dtype.name} tokens from byte {start}"
                    + (f", and starts the next one at byte {after[0]}" if after else ""),
                )
    bin_bytes = header.num_tokens * header.dtype.itemsize
    if end != bin_bytes:
        raise refuse(
            bin_path,
            f"has {bin_bytes} bytes, but its .idx describes {end}: it was truncated, or the two files are not a pair",
        )
