"""Fingerprint of datasets: fast enough to compute at every start, and different if a corpus was replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.files.remote import open_ranges

_END_BYTES = 16 * 1024  # read at the start and at the end of a file


def fingerprint(datasets: Sequence[IndexedDataset]) -> str:
    """Hash the size and both ends of every .bin and .idx, in order; paths and modification times do not matter.

    A full checksum of terabytes would take hours, and a corpus that was built again differs in size or at its ends.
    """
    digest = hashlib.sha256()
    for dataset in datasets:
        for suffix in (".idx", ".bin"):
            _add_file(digest, f"{dataset.prefix}{suffix}")
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: str) -> None:
    with open_ranges(path) as file:
        size = file.size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(0, _END_BYTES))
        if size > _END_BYTES:
            digest.update(file.read(max(_END_BYTES, size - _END_BYTES), _END_BYTES))
