"""Search for all faults in the structure of a `.bin`/`.idx` pair; opening a dataset stops at the first fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.inspect.findings import MOST_NAMED, Finding, fault, listed
from megatron_cpt.data.tokenfile.header import DTYPE_CODES, MAGIC, PREAMBLE, VERSION, IndexHeader, read_header
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import DiskFile, read_array

_BLOCK_ENTRIES = 1 << 20  # entries of a table per block
_SEQUENCES_FOR_TYPE = 1000  # sequences whose pointers reveal the real token size


@dataclass
class _BadPlaces:
    """Positions of one kind of fault: all are counted, and the first few are recorded with their problem."""

    kind: str
    unit: str
    total: int = 0
    named: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, places: npt.NDArray[np.intp], first: int, values: npt.NDArray[Any], problem: str) -> None:
        """Add positions in a block whose first entry is number `first`; `{}` in the problem becomes the value."""
        self.total += len(places)
        for place in places[: MOST_NAMED - len(self.named)].tolist():
            value = int(values[place])
            self.named.append((f"{self.unit} {first + place}", value, problem.format(value)))

    def findings(self, file: str) -> Iterator[Finding]:
        return listed("fault", self.kind, file, self.total, self.named)


def examine_index(prefix: str) -> tuple[IndexHeader | None, list[Finding]]:
    """Examine the complete `.idx` and the length of the `.bin`.

    Returns:
        The header (None if it cannot be parsed or has no known token type), and all faults.

    Raises:
        UserError: one of the files is missing.
    """
    header, findings, refusal = None, list[Finding](), ""
    try:
        read_header(prefix)
    except RefusedError as error:
        refusal = str(error)
    try:
        header, findings = _examine_preamble(prefix)
        if header is not None:
            findings += _examine_tables(header)
    except OSError as error:
        if not is_path_error(error):
            raise
        findings.append(fault("unreadable", f"{prefix}.idx", f"cannot be read: {error.strerror}"))
    if refusal and not findings:  # a dataset that training refuses is never valid
        findings.append(fault("refused", f"{prefix}.idx", refusal))
    return header, findings


def _examine_preamble(prefix: str) -> tuple[IndexHeader | None, list[Finding]]:
    idx, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    with DiskFile(idx) as file:
        preamble, idx_bytes = file.read(PREAMBLE.size), file.size
    if len(preamble) < PREAMBLE.size:
        problem = f"has {idx_bytes} bytes, fewer than the {PREAMBLE.size} of a header"
        return None, [fault("idx_length", idx, problem, value=idx_bytes)]
    magic, version, code, num_sequences, num_boundaries = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        problem = f"is {magic!r}, where {MAGIC!r} makes a megatron index: it is another kind of file"
        return None, [fault("magic", idx, problem, place="bytes 0 to 8", value=repr(magic))]
    findings = []
    if version != VERSION:
        problem = f"version {version}; only version {VERSION} is known"
        findings.append(fault("version", idx, problem, place="byte 9", value=version))
    if num_boundaries < 1:
        problem = "no document boundaries; even an empty dataset has one"
        return None, [*findings, fault("documents", idx, problem, place="byte 26", value=0)]
    if code not in DTYPE_CODES:
        problem = f"token type code {code}; known are 1 to {len(DTYPE_CODES)}"
        return None, [*findings, fault("dtype", idx, problem, place="byte 17", value=code)]
    dtype, bin_bytes = DTYPE_CODES[code], os.path.getsize(bin_path)
    if dtype.kind not in "iu":
        problem = f"token type {dtype.name}, but token ids are integers: this is no text dataset"
        findings.append(fault("dtype", idx, problem, place="byte 17", value=dtype.name))
    header = IndexHeader(prefix, dtype, num_sequences, num_boundaries - 1, bin_bytes // dtype.itemsize)
    if bin_bytes % dtype.itemsize:
        problem = f"has {bin_bytes} bytes, not a whole number of {dtype.name} tokens"
        findings.append(fault("bin_length", bin_path, problem, value=bin_bytes))
    lengths = (header.modes_offset, header.modes_offset + num_sequences)
    if idx_bytes not in lengths:
        problem = (
            f"has {idx_bytes} bytes, but {num_sequences} sequences and {header.num_documents} documents take "
            f"{lengths[0]} (or {lengths[1]} with modes)"
        )
        findings.append(fault("idx_length", idx, problem, value=idx_bytes))
    return header, findings


def _examine_tables(header: IndexHeader) -> list[Finding]:
    """Examine sizes, pointers and boundaries, if the file contains their complete tables."""
    idx_bytes = os.path.getsize(f"{header.prefix}.idx")
    findings: list[Finding] = []
    if idx_bytes >= header.pointers_offset:
        findings += _examine_sizes(header)
    if idx_bytes >= header.documents_offset:
        wrong_type = _examine_type(header)
        findings += [wrong_type] if wrong_type is not None else _examine_pointers(header)
    if idx_bytes >= header.modes_offset:
        findings += _examine_boundaries(header)
    return findings


def _examine_sizes(header: IndexHeader) -> Iterator[Finding]:
    idx, bin_path = f"{header.prefix}.idx", f"{header.prefix}.bin"
    negative, total = _BadPlaces("sizes", "sequence"), 0
    for first, sizes in _table(idx, "<i4", header.sizes_offset, header.num_sequences):
        negative.add(np.flatnonzero(sizes < 0), first, sizes, "has a size of {} tokens")
        total += int(sizes.sum(dtype=np.int64))
    yield from negative.findings(idx)
    bin_bytes, itemsize = os.path.getsize(bin_path), header.dtype.itemsize
    if total * itemsize == bin_bytes:
        return
    problem = (
        f"has {bin_bytes} bytes, but the sizes in its .idx add up to {total} {header.dtype.name} tokens = "
        f"{total * itemsize} bytes"
    )
    types = (dtype for dtype in DTYPE_CODES.values() if dtype.kind in "iu")
    fitting = [dtype.name for dtype in types if total * dtype.itemsize == bin_bytes]
    if total > 0 and fitting:
        problem += f"; tokens of type {' or '.join(fitting)} would fit: the type in the .idx is wrong"
    elif total * itemsize > bin_bytes:
        problem += ": it was truncated, or the two files are not a pair"
    else:
        problem += ": the two files are not a pair"
    yield fault("bin_length", bin_path, problem, value=bin_bytes)


def _examine_type(header: IndexHeader) -> Finding | None:
    """Return a fault if all pointers fit another token size: then the token type is wrong, not the pointers."""
    idx, count = f"{header.prefix}.idx", min(_SEQUENCES_FOR_TYPE, header.num_sequences)
    sizes = read_array(idx, "<i4", count, header.sizes_offset)[:-1].astype(np.int64)
    distances = np.diff(read_array(idx, "<i8", count, header.pointers_offset))
    if not sizes.any() or (distances == sizes * header.dtype.itemsize).all():
        return None
    name = f"token type {header.dtype.name}, {header.dtype.itemsize} bytes"
    for itemsize in sorted({dtype.itemsize for dtype in DTYPE_CODES.values()}):
        if (distances == sizes * itemsize).all():
            problem = f"{name}, but the pointers fit tokens of {itemsize} bytes"
            return fault("dtype", idx, problem, place="byte 17", value=header.dtype.name)
    return None


def _examine_pointers(header: IndexHeader) -> Iterator[Finding]:
    """Check that each sequence starts at the end of the previous one and ends inside the `.bin`."""
    idx, bin_bytes = f"{header.prefix}.idx", os.path.getsize(f"{header.prefix}.bin")
    misplaced, beyond = _BadPlaces("pointers", "sequence"), _BadPlaces("beyond_end", "sequence")
    end = 0
    all_sizes = _table(idx, "<i4", header.sizes_offset, header.num_sequences)
    all_pointers = _table(idx, "<i8", header.pointers_offset, header.num_sequences)
    for (first, sizes), (_, pointers) in zip(all_sizes, all_pointers, strict=True):
        ends = pointers + sizes.astype(np.int64) * header.dtype.itemsize
        expected = np.concatenate([[end], ends[:-1]])
        bad = np.flatnonzero(pointers != expected)
        misplaced.add(bad, first, pointers, "starts at byte {}, not at the end of the previous sequence")
        beyond.add(np.flatnonzero(ends > bin_bytes), first, ends, f"ends at byte {{}} of a .bin of {bin_bytes}")
        end = int(ends[-1])
    yield from misplaced.findings(idx)
    yield from beyond.findings(idx)


def _examine_boundaries(header: IndexHeader) -> Iterator[Finding]:
    """Check that documents start with sequence 0, end with the last sequence, and are in ascending order."""
    idx = f"{header.prefix}.idx"
    wrong, last = _BadPlaces("documents", "document"), 0
    for first, boundaries in _table(idx, "<i8", header.documents_offset, header.num_documents + 1):
        previous = np.concatenate([[last], boundaries[:-1]])
        bad = (boundaries < previous) | (boundaries > header.num_sequences)
        if first == 0 and boundaries[0] != 0:
            bad[0] = True
        problem = f"starts at sequence {{}}: out of order, or not below {header.num_sequences}"
        wrong.add(np.flatnonzero(bad), first, boundaries, problem)
        last = int(boundaries[-1])
    yield from wrong.findings(idx)
    if last != header.num_sequences:
        problem = f"the last document ends at sequence {last} of {header.num_sequences}"
        yield fault("documents", idx, problem, place=f"document {header.num_documents - 1}", value=last)


def _table(path: str, dtype: str, offset: int, count: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield a table of the `.idx` in blocks: number of the first entry, and the entries."""
    itemsize = np.dtype(dtype).itemsize
    for first in range(0, count, _BLOCK_ENTRIES):
        yield first, read_array(path, dtype, min(_BLOCK_ENTRIES, count - first), offset + first * itemsize)
