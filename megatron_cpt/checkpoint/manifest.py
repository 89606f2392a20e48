"""The manifest: size and checksum of every file of a checkpoint, written last, checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import orjson

from megatron_cpt.checkpoint.checksum import ALGORITHM, file_checksum
from megatron_cpt.checkpoint.layout import MANIFEST_FILE
from megatron_cpt.errors import RefusedError

Verify = Literal["full", "sampled", "none"]
SAMPLED_SHARE = 16  # of the shards, one in so many
_THREADS = 2  # hashing leaves Python's lock, so two files at a time use two cores


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    size: int
    checksum: str


def digest(path: Path) -> FileDigest:
    """Measure one file."""
    return FileDigest(path.stat().st_size, file_checksum(path))


def manifest_text(files: Mapping[str, FileDigest]) -> str:
    """The manifest's content."""
    plain = {"algorithm": ALGORITHM, "files": {name: asdict(files[name]) for name in sorted(files)}}
    return orjson.dumps(plain, option=orjson.OPT_INDENT_2).decode()


def read_manifest(checkpoint: Path) -> dict[str, FileDigest]:
    """The files a checkpoint should have.

    Raises:
        RefusedError: there is no manifest or it is damaged.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        if path.is_symlink():
            raise ValueError("a symbolic link")
        plain: Any = orjson.loads(path.read_bytes())
        if plain["algorithm"] != ALGORITHM:
            raise ValueError(f"checksums by {plain['algorithm']}")
        return {name: FileDigest(int(entry["size"]), str(entry["checksum"])) for name, entry in plain["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{path}: missing or damaged ({error}); this checkpoint cannot be verified") from error


def sample(checkpoint: Path, names: Collection[str]) -> set[str]:
    """The files whose checksums a `sampled` verification compares: every small text, and one shard in 16.

    Which shards is keyed by the checkpoint's name: a checkpoint that was found sound is found sound again, and the next
    one is judged by others.
    """
    shards = [name for name in names if name.startswith("__")]
    keys = {name: hashlib.sha256(f"{checkpoint.name}/{name}".encode()).digest() for name in shards}
    drawn = sorted(shards, key=lambda name: keys[name])[: -(-len(shards) // SAMPLED_SHARE)]
    return {*drawn, *(set(names) - set(shards))}


def find_faults(checkpoint: Path, *, part: int = 0, parts: int = 1, how: Verify = "full") -> list[str]:
    """What is wrong with a checkpoint's files, one line each; empty where it is sound.

    Args:
        checkpoint: its folder.
        part: compare the checksums of every `parts`-th file from this one, so that ranks can share the work.
        parts: see `part`.
        how: full: every checksum; sampled: those of `sample`; none: no checksum. Every file must be there and have its
            size in any case.

    Raises:
        RefusedError: there is no usable manifest.
    """
    files = read_manifest(checkpoint)
    chosen = {"full": set(files), "sampled": sample(checkpoint, files), "none": set[str]()}[how]
    faults, to_hash = [], []
    for number, (name, expected) in enumerate(sorted(files.items())):
        path = checkpoint / name
        if not _is_inside(name):
            faults.append(f"{name}: not a file of this folder")
        elif not path.is_file() or path.is_symlink() or path.parent.is_symlink():
            faults.append(f"{name}: missing")
        elif (size := path.stat().st_size) != expected.size:
            faults.append(f"{name}: {size} bytes, should be {expected.size}")
        elif number % parts == part and name in chosen:
            to_hash.append(name)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: digest(checkpoint / name), to_hash)
        for name, measured in zip(to_hash, found, strict=True):
            if measured.checksum != files[name].checksum:
                faults.append(f"{name}: checksum differs: the content is damaged")
    return faults


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder or one level below it (`hf/config.json`)."""
    parts = PurePosixPath(name).parts
    return 1 <= len(parts) <= 2 and "/".join(parts) == name and ".." not in parts and parts[0] != "/"
