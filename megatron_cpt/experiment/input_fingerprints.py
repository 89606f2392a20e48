"""Fingerprints of the files that a run reads, which find a trunk or a dataset replaced by another one of equal name."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence

from megatron_cpt.checkpoint import layout
from megatron_cpt.config import RunConfig
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.listed_documents import open_dataset
from megatron_cpt.data.tokenfile.reader import expand_prefixes
from megatron_cpt.data.tokenizers.tokenizer import read_fingerprint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.whole_io import exists, read_file


class InputFingerprints:
    """Fingerprints of checkpoints, datasets and tokenizers; each is computed once per object."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], str | None] = {}

    def of_run(self, config: RunConfig) -> dict[str, str]:
        """Return the fingerprint per key of run.yaml that names files; keys whose files are missing have no entry."""
        keys = {f"sources.{name}.path": ("data", *source.paths) for name, source in config.sources.items()}
        held_out = config.validation.sources if config.validation is not None else {}
        for name, paths in held_out.items():
            keys[f"validation.sources.{name}"] = ("data", *([paths] if isinstance(paths, str) else paths))
        if config.init.from_ is not None:
            keys["init.from"] = ("checkpoint", config.init.from_)
        if config.tokenizer is not None:
            keys["tokenizer"] = ("tokenizer", config.tokenizer)
        found = {key: self._read(*words) for key, words in keys.items()}
        return {key: value for key, value in found.items() if value is not None}

    def _read(self, kind: str, *names: str) -> str | None:
        if (kind, *names) not in self._found:
            self._found[kind, *names] = None
            with contextlib.suppress(UserError, RefusedError):  # missing or damaged: `train` reports it
                self._found[kind, *names] = _READERS[kind](names)
        return self._found[kind, *names]


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the keys of run.yaml whose files were replaced; a key that one side lacks is no change."""
    return [key for key, value in now.items() if key in before and not is_same_data(before[key], value)]


def _checkpoint_fingerprint(names: Sequence[str]) -> str | None:
    """Hash the manifest of a checkpoint, which has the checksum of every file."""
    path = layout.resolve_checkpoint(names[0]) / layout.MANIFEST_FILE
    return hashlib.sha256(read_file(path)).hexdigest() if exists(path) else None


def _data_fingerprint(names: Sequence[str]) -> str:
    datasets = [open_dataset(prefix) for prefix in expand_prefixes(list(names))]
    try:
        return fingerprint(datasets)
    finally:
        for dataset in datasets:
            dataset.close()


_READERS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "checkpoint": _checkpoint_fingerprint,
    "data": _data_fingerprint,
    "tokenizer": lambda names: read_fingerprint(names[0]),
}
