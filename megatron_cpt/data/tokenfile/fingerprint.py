"""Which files a source is: cheap enough for every start, sharp enough to notice a corpus that was replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.files.remote import open_ranges

_ENDS = 16 * 1024  # bytes read at either end of a file


def fingerprint(datasets: Sequence[IndexedDataset]) -> str:
    """A hash over the size and both ends of every .bin and .idx, in order; paths and times do not count.

    A full checksum of terabytes would take hours; a corpus that was made anew differs in size or at its ends.
    """
    whole = hashlib.sha256()
    for dataset in datasets:
        for suffix in (".idx", ".bin"):
            _add_file(whole, f"{dataset.prefix}{suffix}")
    return whole.hexdigest()


def _add_file(whole: hashlib._Hash, path: str) -> None:
    with open_ranges(path) as file:
        size = file.size
        whole.update(size.to_bytes(8, "little"))
        whole.update(file.read(0, _ENDS))
        if size > _ENDS:
            whole.update(file.read(max(_ENDS, size - _ENDS), _ENDS))
