"""The header of a `.idx` file: all that planning and starting a run need to know of a token file, in a few small reads.

Layout of a `.idx` (megatron-core `datasets/indexed_dataset.py`, version 1; everything little-endian):

    9 bytes    b"MMIDIDX\\0\\0"
    uint64     version (1)
    uint8      code of the token type
    uint64     S: number of sequences
    uint64     D: number of document boundaries, one more than there are documents
    int32[S]   tokens of each sequence
    int64[S]   where each sequence begins in the `.bin`, in bytes
    int64[D]   the sequence each document begins with; the last entry is S
    int8[S]    mode of each sequence: only in multimodal data sets

The `.bin` holds the tokens of all sequences one after another and nothing else.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.remote import RangeFile, is_file, open_ranges

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
PREAMBLE = struct.Struct("<9sQBQQ")

# megatron-core's `DType` enumeration; always little-endian, so that a file means the same on every machine.
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

_WAY_OUT = "copy the .bin/.idx pair again from where it is whole, or build it anew with `megatron-cpt preprocess`"


@dataclass(frozen=True)
class IndexHeader:
    """What the first bytes of a `.idx` and the two file sizes tell.

    Attributes:
        prefix: the path without `.bin` or `.idx`.
        dtype: type of one token.
        num_sequences: megatron's sequences; a document has one or more.
        num_documents: real documents (the file stores one boundary more).
        num_tokens: tokens in the `.bin`.
        has_modes: whether the file carries the modes of a multimodal data set.
    """

    prefix: str
    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int
    num_tokens: int
    has_modes: bool = False

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
        """Byte offset of what follows the document boundaries: the modes, or the end of the file."""
        return self.documents_offset + 8 * (self.num_documents + 1)


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest token type megatron uses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return DTYPE_CODES[8] if vocab_size < 65500 else DTYPE_CODES[4]


def dtype_code(dtype: np.dtype[Any]) -> int:
    """The code a token type has in the file.

    Raises:
        UserError: megatron's format has no such token type.
    """
    for code, known in DTYPE_CODES.items():
        if known == dtype:
            return code
    raise UserError(f"token type {dtype} cannot be stored in a .bin/.idx; known: {_dtype_names()}")


def read_header(prefix: str | os.PathLike[str]) -> IndexHeader:
    """Reads the header of PREFIX.idx and checks that it, the rest of the file and PREFIX.bin agree in size.

    The cost does not depend on the size of the data: the preamble, the last entry of each table, two file sizes.

    Raises:
        UserError: one of the two files is missing or may not be read.
        RefusedError: a file is cut, foreign, or the two do not belong together.
    """
    prefix = os.fspath(prefix)
    idx_path, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    missing = [path for path in (idx_path, bin_path) if not is_file(path)]
    if missing:
        raise UserError(f"no such file: {' and '.join(missing)}; a data set is a pair PREFIX.bin and PREFIX.idx")
    try:
        with open_ranges(idx_path) as idx, open_ranges(bin_path) as tokens:
            bin_bytes = tokens.size
            header = _parse_preamble(prefix, idx_path, idx.read(0, PREAMBLE.size), idx.size, bin_bytes)
            _check_ends(idx, header, idx_path, bin_path, bin_bytes)
    except OSError as error:
        path = error.filename or idx_path
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return header


def refuse(path: str, problem: str) -> RefusedError:
    """The error for a file that must not be used: which one, what is wrong, the way out."""
    return RefusedError(f"{path}: {problem}; {_WAY_OUT}")


def _dtype_names() -> str:
    return ", ".join(dtype.name for dtype in DTYPE_CODES.values())


def _parse_preamble(prefix: str, idx_path: str, preamble: bytes, idx_bytes: int, bin_bytes: int) -> IndexHeader:
    if len(preamble) < PREAMBLE.size:
        raise refuse(idx_path, f"has {len(preamble)} bytes, fewer than the {PREAMBLE.size} of a header")
    magic, version, code, num_sequences, num_boundaries = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise refuse(idx_path, f"is not a megatron index: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise refuse(idx_path, f"has version {version}; only version {VERSION} is known")
    if code not in DTYPE_CODES:
        raise refuse(idx_path, f"has the unknown token type code {code}; known are 1 to 8 ({_dtype_names()})")
    if num_boundaries < 1:
        raise refuse(idx_path, "has no document boundaries; even an empty data set has one")
    dtype = DTYPE_CODES[code]
    if bin_bytes % dtype.itemsize:
        raise refuse(f"{prefix}.bin", f"has {bin_bytes} bytes, not a whole number of {dtype.name} tokens: it was cut")
    plain = IndexHeader(prefix, dtype, num_sequences, num_boundaries - 1, bin_bytes // dtype.itemsize)
    with_modes = plain.modes_offset + num_sequences
    if idx_bytes not in (plain.modes_offset, with_modes):
        raise refuse(
            idx_path,
            f"has {idx_bytes} bytes, but {num_sequences} sequences and {num_boundaries - 1} documents take "
            f"{plain.modes_offset} (or {with_modes} with modes): it was cut or is damaged",
        )
    has_modes = num_sequences > 0 and idx_bytes == with_modes
    return IndexHeader(prefix, dtype, num_sequences, num_boundaries - 1, plain.num_tokens, has_modes)


def _check_ends(idx: RangeFile, header: IndexHeader, idx_path: str, bin_path: str, bin_bytes: int) -> None:
    """What the tables' first and last entries say must fit each other and lead exactly to the end of the `.bin`."""
    (last_boundary,) = struct.unpack("<q", idx.read(header.modes_offset - 8, 8))
    if last_boundary != header.num_sequences:
        raise refuse(idx_path, f"ends its last document at sequence {last_boundary} of {header.num_sequences}")
    last, end = header.num_sequences - 1, 0
    # a wrong token type makes every pointer wrong, so looking at both ends finds nearly all of those
    for sequence in sorted({0, max(0, last - 1), last}) if header.num_sequences else []:
        (size,) = struct.unpack("<i", idx.read(header.sizes_offset + 4 * sequence, 4))
        num_pointers = 2 if sequence < last else 1
        pointers = idx.read(header.pointers_offset + 8 * sequence, 8 * num_pointers)
        start, *after = struct.unpack(f"<{num_pointers}q", pointers)
        end = start + size * header.dtype.itemsize
        if size < 0 or start < 0 or (sequence == 0 and start) or after not in ([], [end]):
            raise refuse(
                idx_path,
                f"gives sequence {sequence} {size} {header.dtype.name} tokens from byte {start}"
                + (f", and begins the next one at byte {after[0]}" if after else ""),
            )
    if end != bin_bytes:
        raise refuse(
            bin_path,
            f"has {bin_bytes} bytes, but its .idx describes {end}: it was cut, or the two files are not a pair",
        )
