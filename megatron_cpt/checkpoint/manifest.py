"""The manifest: size and SHA-256 of every file of a checkpoint, written last, checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint.layout import MANIFEST_FILE
from megatron_cpt.errors import RefusedError


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    size: int
    sha256: str


def digest(path: Path) -> FileDigest:
    """Measure one file."""
    with open(path, "rb") as file:
        return FileDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def manifest_text(files: Mapping[str, FileDigest]) -> str:
    """The manifest's content."""
    plain = {"algorithm": "sha256", "files": {name: asdict(files[name]) for name in sorted(files)}}
    return orjson.dumps(plain, option=orjson.OPT_INDENT_2).decode()


def read_manifest(checkpoint: Path) -> dict[str, FileDigest]:
    """The files a checkpoint should have.

    Raises:
        RefusedError: there is no manifest or it is damaged.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        plain: Any = orjson.loads(path.read_bytes())
        return {name: FileDigest(int(entry["size"]), str(entry["sha256"])) for name, entry in plain["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{path}: missing or damaged ({error}); this checkpoint cannot be verified") from error


def find_faults(checkpoint: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; empty where it is sound.

    Args:
        checkpoint: its folder.
        part: check only every `parts`-th file from this one, so that ranks can share the work.
        parts: see `part`.

    Raises:
        RefusedError: there is no usable manifest.
    """
    faults = []
    for number, (name, expected) in enumerate(sorted(read_manifest(checkpoint).items())):
        path = checkpoint / name
        if Path(name).name != name:
            faults.append(f"{name}: not a plain file name")
        elif not path.is_file() or path.is_symlink():
            faults.append(f"{name}: missing")
        elif (size := path.stat().st_size) != expected.size:
            faults.append(f"{name}: {size} bytes, should be {expected.size}")
        elif number % parts == part and digest(path).sha256 != expected.sha256:
            faults.append(f"{name}: checksum differs: the content is damaged")
    return faults
