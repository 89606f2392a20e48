"""Formats of input files, found by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lines", "table", "text", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".csv": "table",
    ".tsv": "table",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKINGS = (".gz", ".zst", ".bz2", ".xz")
KNOWN = f"{', '.join(_KINDS)}; all but the last two also with {', '.join(_PACKINGS)}"

_CONVERSIONS = {
    (".zip",): "unzip -p {} | megatron-cpt preprocess --input -",
    (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"): "tar -xf {} and give the folder",
    (".7z",): "7z x {} and give the folder",
    (".lz4",): "lz4 -dc {} | megatron-cpt preprocess --input -",
    (".md", ".html", ".xml", ".tex", ".rst", ".py"): "rename it to .txt if each file is one document",
    (".bin", ".idx"): "megatron-cpt merge joins datasets that are encoded already",
}
_LISTED = 20  # most names in a message


@dataclass(frozen=True)
class FileFormat:
    """Format of an input file.

    Attributes:
        packing: ending of a packed file, such as ".gz"; empty for others.
        delimiter: character between the columns of a table.
    """

    kind: Kind
    packing: str = ""
    delimiter: str = ","


def find_format(path: str) -> FileFormat | None:
    """Return the format of a file by its name, in upper or lower case; None if it is not known."""
    name = os.path.basename(path).lower()
    packing = next((ending for ending in _PACKINGS if name.endswith(ending)), "")
    ending = os.path.splitext(name.removesuffix(packing))[1]
    kind = _KINDS.get(ending)
    if kind is None or (packing and kind in ("parquet", "arrow")):
        return None
    return FileFormat(kind, packing, "\t" if ending == ".tsv" else ",")


def convert_hint(path: str) -> str:
    """Return how to make a readable file of one with an unknown ending."""
    for endings, hint in _CONVERSIONS.items():
        if path.lower().endswith(endings):
            return hint.format(path)
    return 'convert it to JSON Lines, one {"text": ...} per line'


def name_files(paths: Sequence[str]) -> str:
    """Return the names of files for a message; of many files the first ones, and a count per ending."""
    names = ", ".join(paths[:_LISTED])
    if len(paths) <= _LISTED:
        return names
    endings = Counter(os.path.splitext(path)[1] or "no ending" for path in paths[_LISTED:])
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    return f"{names} and {len(paths) - _LISTED:,} more ({counts})"
