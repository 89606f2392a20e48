"""Header of a cache: everything that its records depend on, in `teacher.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from megatron_cpt.data.teacher_cache.top_k_records import RecordFormat
from megatron_cpt.data.teacher_cache.window_grid import WindowGrid
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.resumable import seal, unseal
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import is_regular_file, read_file

HEADER_FILE = "teacher.json"
_FORMAT = "megatron-cpt teacher cache"
_VERSION = 1


@dataclass(frozen=True)
class TaughtFile:
    """Token file whose records a cache holds.

    Attributes:
        source: name of the source in the run that the cache was made for; for messages only.
        prefix: path of the token file then; for messages only.
        fingerprint: of the file's content, see `tokenfile/fingerprint.py`.
        tokens: number of its tokens.
    """

    source: str
    prefix: str
    fingerprint: str
    tokens: int


@dataclass(frozen=True)
class CacheHeader:
    """Content of `teacher.json`.

    Attributes:
        teacher: digest of the teacher's weights and model section.
        teacher_path: the teacher's checkpoint; for messages only.
        precision: number formats of the teacher's forward pass.
        tokenizer: fingerprint of the tokenizer of the ids; None: unknown.
        vocab: the teacher's ids are below it.
        top_k: tokens per record.
        window, stride: see `WindowGrid`.
        documents: treatment of document boundaries in the teacher's attention, see `DocumentOptions.attention_key`.
        files: the cached files, each once.
    """

    teacher: str
    teacher_path: str
    precision: Mapping[str, Any]
    tokenizer: str | None
    vocab: int
    top_k: int
    window: int
    stride: int
    documents: Mapping[str, Any]
    files: tuple[TaughtFile, ...]

    @property
    def records(self) -> RecordFormat:
        """Format of the records."""
        return RecordFormat(self.top_k, self.vocab)

    @property
    def num_positions(self) -> int:
        """Records of all files."""
        return sum(self.grid(index).num_positions for index in range(len(self.files)))

    @property
    def num_bytes(self) -> int:
        """Size of all records in bytes."""
        return self.num_positions * self.records.num_bytes

    def grid(self, index: int) -> WindowGrid:
        """Return the windows over a file."""
        return WindowGrid(self.files[index].tokens, self.window, self.stride)

    @property
    def digest(self) -> str:
        """Hash of everything but the files that decides the content of a record."""
        return f"{self._seed:016x}"

    def key(self, index: int) -> int:
        """Return the key of the records of a file: it differs for another teacher, other options or another file."""
        file = self.files[index]
        return xxhash.xxh3_64_intdigest(f"{file.fingerprint}/{file.tokens}".encode(), self._seed)

    @cached_property
    def _seed(self) -> int:
        return xxhash.xxh3_64_intdigest(seal(self.settings()))

    def settings(self) -> dict[str, Any]:
        """Return what decides the content of a record besides its file, as plain values."""
        plain = asdict(self)
        for name in ("teacher_path", "files"):
            plain.pop(name)
        return plain

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return seal({"format": _FORMAT, "format_version": _VERSION, **asdict(self)}) + b"\n"


def file_name(index: int) -> str:
    """Return the name of the file with the records of a token file."""
    return f"{index:05d}.topk"


def read_header(folder: Path) -> CacheHeader:
    """Read the header of a finished cache.

    Raises:
        RefusedError: it is missing, damaged or of a newer format.
    """
    path = folder / HEADER_FILE
    try:
        if not is_regular_file(path):  # opening a FIFO waits for a writer
            raise FileNotFoundError("no such file")
        plain = unseal(read_file(path).rstrip(b"\n"))
        if plain.pop("format") != _FORMAT:
            raise ValueError("another format")
        if (version := plain.pop("format_version")) > _VERSION:
            raise RefusedError(f"{path}: format version {version}, this software reads up to {_VERSION}; update it")
        return CacheHeader(**{**plain, "files": tuple(TaughtFile(**file) for file in plain["files"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not is_path_error(error):
            raise
        raise RefusedError(
            f"{path}: missing or damaged ({error}): {folder} is no finished cache of a teacher; make it with "
            "`megatron-cpt teach`, or copy it again"
        ) from error
