"""Config, tokenizer and generation files that accompany a model through import, training and export."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_cpt.checkpoint.layout import RUN_FILE, resolve_checkpoint
from megatron_cpt.config import read_mapping
from megatron_cpt.convert.megatron.torch_dist_reader import newest_iteration
from megatron_cpt.errors import RefusedError

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
"""Folder of a checkpoint that keeps these files."""
TOKENIZER_FILES = {"tokenizer.json": "huggingface", "vocab.json": "huggingface", "tokenizer.model": "sentencepiece"}
"""Kind of tokenizer per file that holds one, the preferred file first."""
_TOKENIZER_FOLDERS = ("tokenizer", "context/nemo_tokenizer", "../context/nemo_tokenizer")
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md", ".model.v3")
_PREFIXES = ("LICENSE", "NOTICE")
_TEMPLATE_FOLDER = "additional_chat_templates"
_MAX_BYTES = 256 << 20
_MAX_ANCESTORS = 8  # runs that started from runs; also ends a cycle of `init.from`


def find_side_files(path: Path) -> dict[str, Path]:
    """Return config, tokenizer, generation, license and README files of a Hugging Face folder.

    Weights and code are never among them.

    Returns:
        Path by name, such as `tokenizer.json` or `additional_chat_templates/tool_use.jinja`.

    Raises:
        RefusedError: a file is a link that leads out of the folder.
    """
    root, templates = path.resolve(), path / _TEMPLATE_FOLDER
    # the cache links snapshots/REVISION/NAME to blobs
    homes = {root, root / _TEMPLATE_FOLDER, root.parent.parent / "blobs"}
    found = {}
    for file in sorted([*path.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        is_named = file.name.endswith(_SUFFIXES) or file.name.startswith(_PREFIXES)
        if not is_named or file.name.endswith(".index.json") or file.name.startswith("."):
            continue
        real = Path(os.path.realpath(file))
        if real.parent not in homes:
            raise RefusedError(
                f"{file}: a link that leads out of the folder, to {real}; replace the link by a copy of the file"
            )
        if real.is_file() and real.stat().st_size <= _MAX_BYTES:
            found[file.relative_to(path).as_posix()] = real
    return found


def side_files_of_checkpoint(path: Path) -> dict[str, Path]:
    """Return the files that belong to a checkpoint.

    They are in its `hf` folder, or in the checkpoint that its run started from, or in the places where Megatron-Bridge
    and NeMo 2 keep a tokenizer.
    """
    if found := _side_files_of_import(path):
        return found
    folders = [folder for folder in (newest_iteration(path), path) if folder is not None]
    places = [place for folder in folders for name in _TOKENIZER_FOLDERS if (place := folder / name).is_dir()]
    return find_side_files(places[0]) if places else {}


def _side_files_of_import(path: Path) -> dict[str, Path]:
    for _ in range(_MAX_ANCESTORS):
        if (path / HF_FOLDER).is_dir():
            return find_side_files(path / HF_FOLDER)
        init = read_mapping(path / RUN_FILE).get("init") if (path / RUN_FILE).is_file() else None
        ancestor = init.get("from") if isinstance(init, Mapping) else None
        if not isinstance(ancestor, str):
            return {}
        if not Path(ancestor).is_dir():
            logger.warning(
                "%s: its run started from %s, which does not exist, so config and tokenizer files are unknown; name "
                "a folder with these files: --files DIR",
                path,
                ancestor,
            )
            return {}
        path = resolve_checkpoint(ancestor)
    return {}


def tokenizer_among(files: Mapping[str, Path]) -> str | None:
    """Return KIND:PATH of the tokenizer among side files; None: they hold none."""
    for name, kind in TOKENIZER_FILES.items():
        if name in files:
            return f"{kind}:{files[name].parent if kind == 'huggingface' else files[name]}"
    return None
