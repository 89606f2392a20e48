"""Fingerprint of datasets: fast enough to compute at every start, and different if a corpus was replaced.

It has three parts, or four with times, joined by "+":

    sha256 of the size and both ends of every file      as in checkpoints of earlier versions
    XXH3 of about 64 more blocks of the files           files on a local or shared file system
    XXH3 of the content hashes in the sidecars          if every dataset has a sidecar
    XXH3 of sizes and modification times                files on a local or shared file system

Two fingerprints agree if all parts agree that both have, so a run can continue from a checkpoint of an earlier version.
The last part is no content: a copy of the files may have other times. If only it differs, the files may have been
replaced by others with equal ends and equal blocks, so a resumed run compares the complete content with the sidecars.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenfile.sidecar import read_sidecar
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.remote import is_remote, open_ranges

_END_BYTES = 16 * 1024  # read at the start and at the end of a file
_NUM_BLOCKS = 64  # over all files, at least one per file
_BLOCK_BYTES = 4 * 1024
_SEPARATOR = "+"
_UNKNOWN = "-"
_CONTENT_PARTS = 3


def fingerprint(datasets: Sequence[IndexedDataset], *, with_times: bool = False) -> str:
    """Hash the datasets, in order; paths do not matter, and modification times only if they are asked for.

    A document list counts with the documents that it names and with the pairs that it chooses from.

    A full checksum of terabytes would take hours, and a corpus that was built again differs in size or at its ends.
    """
    ends, blocks, content, times = hashlib.sha256(), Checksum(), Checksum(), Checksum()
    pairs = [pair for dataset in datasets for pair in dataset.parts]
    num_blocks = -(-_NUM_BLOCKS // max(1, len(pairs)))
    has_sidecars = True
    for dataset in datasets:
        ends.update(dataset.list_digest)
    for dataset in pairs:
        for suffix in (".idx", ".bin"):
            _add_file(ends, blocks, f"{dataset.prefix}{suffix}", num_blocks)
        for identity in dataset.header.identities:
            if identity is not None:
                times.update(f"{identity.num_bytes} {identity.mtime_ns} ".encode())
        sidecar = read_sidecar(dataset.header)
        has_sidecars &= sidecar is not None
        if sidecar is not None:
            content.update("".join(sidecar.checksums.values()).encode())
    is_local = not any(is_remote(pair.prefix) for pair in pairs)
    parts = [
        ends.hexdigest(),
        blocks.hexdigest() if is_local else _UNKNOWN,
        content.hexdigest() if has_sidecars else _UNKNOWN,
    ]
    if with_times:
        parts.append(times.hexdigest() if is_local else _UNKNOWN)
    return _SEPARATOR.join(parts)


def is_same_data(before: str, after: str) -> bool:
    """Return whether two fingerprints agree in every part about the content that both have."""
    pairs = zip(before.split(_SEPARATOR)[:_CONTENT_PARTS], after.split(_SEPARATOR), strict=False)
    return all(one == other or _UNKNOWN in (one, other) for one, other in pairs)


def is_touched(before: str, after: str) -> bool:
    """Return whether the files were written to, replaced or copied between two fingerprints that agree."""
    times = [parts[_CONTENT_PARTS:] for parts in (before.split(_SEPARATOR), after.split(_SEPARATOR))]
    return all(times) and times[0] != times[1] and [_UNKNOWN] not in times


def _add_file(ends: hashlib._Hash, blocks: Checksum, path: str, num_blocks: int) -> None:
    with open_ranges(path) as file:
        size = file.size
        ends.update(size.to_bytes(8, "little"))
        ends.update(file.read(0, _END_BYTES))
        if size > _END_BYTES:
            ends.update(file.read(max(_END_BYTES, size - _END_BYTES), _END_BYTES))
        if size > 2 * _END_BYTES and not is_remote(path):  # each request to an object store takes 10 to 100 ms
            for number in range(1, num_blocks + 1):
                blocks.update(file.read(size * number // (num_blocks + 1), _BLOCK_BYTES))
