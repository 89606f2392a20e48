"""Document lists of chosen places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.data import IndexedDataset
from megatron_cpt.data.tokenfile.document_list import DocumentList, describe_dataset, write_document_list


def write_list(
    path: Path, pairs: Sequence[IndexedDataset], chosen: Sequence[tuple[int, int]], *, relative: bool = False
) -> Path:
    """Write a list of (pair, document) places in ascending order; `relative`: the pairs are in the folder of it."""
    places = np.array(chosen, np.int64).reshape(-1, 2)
    datasets = [describe_dataset(pair, Path(pair.prefix).name if relative else None) for pair in pairs]
    reasons = (np.zeros(len(places), np.float32), np.zeros(len(places), np.int64))
    write_document_list(path, DocumentList(datasets, places[:, 0].astype(np.int32), places[:, 1], *reasons))
    return path
