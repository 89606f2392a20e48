"""Sidecar PREFIX.json of a dataset: the tokenizer of its ids, the id that ends its documents, and content hashes.

Megatron-LM neither writes nor reads it, so a dataset without one is accepted. A PREFIX.json of another program is not a
sidecar: it is never replaced, and the dataset then has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_cpt import __version__
from megatron_cpt.data.tokenfile.header import DTYPE_CODES, PREAMBLE, IndexHeader
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.checksum import ALGORITHM, file_checksum
from megatron_cpt.files.remote import is_file, open_ranges
from megatron_cpt.files.whole_io import DiskFile

_FORMAT = "megatron-cpt dataset"
_VERSION = 1
_HEAD = re.compile(rb'\s*\{\s*"format"\s*:\s*"' + _FORMAT.encode() + b'"')
_HEAD_BYTES = 64
_MOST_BYTES = 1 << 20
_SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Facts about a dataset that its ids do not show.

    Attributes:
        tokenizer: KIND:PATH of the tokenizer; None: unknown.
        fingerprint: hash of the tokenizer's content; None: unknown.
        eod_id: id that ends every document; None: there is none, or it is unknown.
        made_by: the command and its main options.
        versions: versions of the packages that made the ids.
    """

    tokenizer: str | None = None
    fingerprint: str | None = None
    eod_id: int | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the tokenizer with the first digits of its fingerprint, for messages."""
        return name_tokenizer(self.tokenizer or "unknown", self.fingerprint or "")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Content of a PREFIX.json.

    Attributes:
        checksums: XXH3 of the complete files, by "bin" and "idx".
    """

    origin: Origin
    documents: int
    tokens: int
    dtype: str
    checksums: Mapping[Literal["bin", "idx"], str]

    def to_json(self) -> bytes:
        """Return the file's content."""
        facts = {key: value for key, value in asdict(self).items() if key != "origin"}
        plain = {"format": _FORMAT, "format_version": _VERSION, **asdict(self.origin), **facts, "algorithm": ALGORITHM}
        return orjson.dumps(plain, option=orjson.OPT_INDENT_2) + b"\n"


def own_versions(*packages: str) -> dict[str, str]:
    """Return the versions of this package and of others."""
    import importlib.metadata  # here: it imports email and zipfile, and a run that starts reads no version

    return {"megatron_cpt": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def name_tokenizer(spec: str, fingerprint: str) -> str:
    """Return a tokenizer's name for messages, such as `huggingface:tok (1f8ac10f23c5)`."""
    return spec if fingerprint in ("", spec) else f"{spec} ({fingerprint[:_SHOWN_DIGITS]})"


def sidecar_path(prefix: str) -> str:
    """Return the path of a dataset's sidecar."""
    return f"{prefix}.json"


def is_sidecar(path: str) -> bool:
    """Return whether a JSON file is the sidecar of a dataset, intact or damaged."""
    with open_ranges(path) as file:
        return _HEAD.match(file.read(0, _HEAD_BYTES)) is not None  # the file may be a large one of the user


def is_free(prefix: str) -> bool:
    """Return whether a sidecar may be written: there is none, or it is a sidecar too."""
    path = Path(sidecar_path(prefix))
    return not path.exists() or (path.is_file() and is_sidecar(str(path)))


def read_sidecar(header: IndexHeader) -> Sidecar | None:
    """Return a dataset's sidecar; None if it has none.

    Raises:
        RefusedError: it is damaged, of a newer format, or describes other files.
    """
    path = sidecar_path(header.prefix)
    if not is_file(path) or not is_sidecar(path):
        return None
    sidecar = _parse(path)
    there = (sidecar.documents, sidecar.tokens, sidecar.dtype)
    if there != (header.num_documents, header.num_tokens, header.dtype.name):
        raise RefusedError(
            f"{path}: describes {there[0]:,} documents, {there[1]:,} {there[2]} tokens, but the .bin/.idx pair has "
            f"{header.num_documents:,} documents, {header.num_tokens:,} {header.dtype.name} tokens: another program "
            f"replaced it; copy all three files again, or remove {path} if the pair is right"
        )
    return sidecar


def describe_pair(bin_path: str, idx_path: str, origin: Origin, *, bin_checksum: str | None = None) -> Sidecar:
    """Return the sidecar of a complete pair, under any names.

    Args:
        bin_checksum: checksum of the `.bin`, if it was computed while the file was written; otherwise it is read.
    """
    with DiskFile(idx_path) as idx:
        _, _, code, _, num_boundaries = PREAMBLE.unpack(idx.read(PREAMBLE.size))
    dtype = DTYPE_CODES[code]
    checksums: dict[Literal["bin", "idx"], str]
    checksums = {"bin": bin_checksum or file_checksum(Path(bin_path)), "idx": file_checksum(Path(idx_path))}
    tokens = Path(bin_path).stat().st_size // dtype.itemsize
    return Sidecar(origin=origin, documents=num_boundaries - 1, tokens=tokens, dtype=dtype.name, checksums=checksums)


def join_origins(origins: Sequence[Origin | None], made_by: Mapping[str, Any]) -> Origin:
    """Return the origin of a dataset made of others; a fact on which they differ, or that one lacks, is unknown."""
    first, *others = [origin or Origin() for origin in origins]
    for other in others:
        if other.fingerprint != first.fingerprint:
            first = replace(first, tokenizer=None, fingerprint=None)
        if other.eod_id != first.eod_id:
            first = replace(first, eod_id=None)
    return replace(first, made_by=made_by, versions=own_versions())


def content_faults(
    prefix: str, sidecar: Sidecar, progress: Callable[[int], None] | None = None
) -> list[tuple[str, str]]:
    """Return (path, problem) for each file whose content differs from the sidecar; reads both files completely.

    Args:
        progress: called with the number of bytes after each piece.
    """
    faults = []
    for ending, saved in sidecar.checksums.items():
        path = f"{prefix}.{ending}"
        done = 0

        def advance(total: int) -> None:
            nonlocal done
            if progress is not None:
                progress(total - done)
            done = total

        found = file_checksum(Path(path), advance)
        if found != saved:
            problem = (
                f"its content has the checksum {found}, {sidecar_path(prefix)} says {saved}: the file was changed or "
                "damaged; copy it again from an intact source, or build it again with `megatron-cpt preprocess`"
            )
            faults.append((path, problem))
    return faults


def _parse(path: str) -> Sidecar:
    from pydantic import TypeAdapter, ValidationError  # here: a process that only reads tokens starts without it

    with open_ranges(path) as file:
        content = file.read(0, _MOST_BYTES)
    try:
        plain = orjson.loads(content)
        if plain["format_version"] > _VERSION:
            raise RefusedError(
                f"{path}: format version {plain['format_version']}, this software reads up to {_VERSION}; update it"
            )
        origin = {name: plain[name] for name in Origin.__dataclass_fields__}
        facts = {name: plain[name] for name in Sidecar.__dataclass_fields__ if name != "origin"}
        sidecar = TypeAdapter(Sidecar).validate_python({**facts, "origin": origin})
        if set(sidecar.checksums) != {"bin", "idx"}:
            raise KeyError("checksums")
    except (orjson.JSONDecodeError, ValidationError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, orjson.JSONDecodeError) else _first_fault(error)
        raise RefusedError(f"{path}: damaged ({reason}); copy it again, or remove it: a dataset needs none") from error
    return sidecar


def _first_fault(error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
