"""The manifest: size and checksum of every file of a checkpoint, written last, checked before anything is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import orjson

from megatron_cpt.checkpoint.layout import MANIFEST_FILE
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.checksum import ALGORITHM, file_checksum

Verify = Literal["full", "sampled", "none"]
SAMPLED_SHARE = 16  # of the shards, one in so many
_THREADS = 2  # hashing leaves Python's lock, so two files at a time use two cores


class CorruptCheckpointError(RefusedError):
    """Files of a checkpoint are not what was written.

    Attributes:
        path: the checkpoint.
        faults: one line each.
    """

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        super().__init__(f"{path}: broken: {'; '.join(faults)}; use another checkpoint")
        self.path, self.faults = path, list(faults)


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


def is_shard(name: str) -> bool:
    """Whether a file holds tensors; all others are small."""
    return name.startswith("__")


def sample(checkpoint: Path, names: Collection[str]) -> set[str]:
    """The files whose checksums a `sampled` verification compares: every small text, and one shard in 16.

    Which shards is keyed by the checkpoint's name: a checkpoint that was found sound is found sound again, and the next
    one is judged by others.
    """
    shards = [name for name in names if is_shard(name)]
    keys = {name: hashlib.sha256(f"{checkpoint.name}/{name}".encode()).digest() for name in shards}
    drawn = sorted(shards, key=lambda name: keys[name])[: -(-len(shards) // SAMPLED_SHARE)]
    return {*drawn, *(set(names) - set(shards))}


def _chosen(checkpoint: Path, names: Collection[str], how: Verify) -> set[str]:
    """The files whose checksums a verification compares."""
    if how == "none":
        return set()
    return set(names) if how == "full" else sample(checkpoint, names)


def shards_to_compare(checkpoint: Path, how: Verify) -> dict[str, FileDigest]:
    """The shards whose checksums a verification compares, in the order they were written: those of rank 0 first.

    Raises:
        RefusedError: there is no usable manifest.
    """
    if how == "none":
        return {}
    files = read_manifest(checkpoint)
    names = [name for name in _chosen(checkpoint, files, how) if is_shard(name)]
    return {name: files[name] for name in sorted(names, key=_order_of_writing)}


def _order_of_writing(shard: str) -> list[int]:
    """`__2_10.distcp` comes after `__2_9.distcp`."""
    return [int(number) for number in re.findall(r"\d+", shard)]


def find_faults(checkpoint: Path, how: Verify = "full", *, with_shards: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; empty where it is sound.

    Args:
        checkpoint: its folder.
        how: whose checksums to compare. Every file must be there and have its size in any case.
        with_shards: compare the checksums of shards too, not those of the small files only.

    Raises:
        RefusedError: there is no usable manifest.
    """
    files = read_manifest(checkpoint)
    chosen = {name for name in _chosen(checkpoint, files, how) if with_shards or not is_shard(name)}
    faults, to_hash = [], []
    for name, expected in sorted(files.items()):
        path = checkpoint / name
        if not _is_inside(name):
            faults.append(f"{name}: not a file of this folder")
        elif not path.is_file() or path.is_symlink() or path.parent.is_symlink():
            faults.append(f"{name}: missing")
        elif (size := path.stat().st_size) != expected.size:
            faults.append(f"{name}: {size} bytes, should be {expected.size}")
        elif name in chosen:
            to_hash.append(name)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: compare(checkpoint, name, files[name]), to_hash)
        return [*faults, *(fault for fault in found if fault is not None)]


def compare(
    checkpoint: Path, name: str, expected: FileDigest, progress: Callable[[int], None] = lambda num_bytes: None
) -> str | None:
    """What is wrong with a file's content, if anything is; `progress`: see `file_checksum`."""
    if file_checksum(checkpoint / name, progress) == expected.checksum:
        return None
    return f"{name}: checksum differs: the content is damaged"


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder or one level below it (`hf/config.json`)."""
    parts = PurePosixPath(name).parts
    return 1 <= len(parts) <= 2 and "/".join(parts) == name and ".." not in parts and parts[0] != "/"
