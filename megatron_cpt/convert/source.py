"""Whatever is to be imported, as one thing: a model, its tensors by Megatron's global names, files that go along."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.layout import RUN_FILE, checkpoints_folder, is_checkpoint, resolve_checkpoint
from megatron_cpt.checkpoint.manifest import Verify
from megatron_cpt.config import ModelConfig, read_mapping
from megatron_cpt.convert.huggingface.config import read_model
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE, HfFolder, read_json_object
from megatron_cpt.convert.mapping.families import detect
from megatron_cpt.convert.mapping.resolve import WEIGHT_DTYPES, TensorRule, check_tensors, resolve, tied_copies
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.mapping.tensors import EMBEDDING, OUTPUT_LAYER, Weights
from megatron_cpt.convert.megatron.config import read_megatron_model
from megatron_cpt.convert.megatron.torch_dist_plan import Form
from megatron_cpt.convert.megatron.torch_dist_reader import (
    TorchDistWeights,
    find_torch_dist,
    newest_iteration,
    take_as_it_is,
)
from megatron_cpt.convert.verified_reads import FirstRead
from megatron_cpt.errors import RefusedError, UserError

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
"""Where the config, tokenizer and generation files of a Hugging Face model lie in a checkpoint."""
_TOKENIZER_FOLDERS = ("tokenizer", "context/nemo_tokenizer", "../context/nemo_tokenizer")
_HF_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_MAX_SIDE_FILE = 256 << 20


@dataclass(frozen=True)
class SourceCheckpoint:
    """A model that is to be imported.

    Attributes:
        kind: `huggingface`, `torch_dist` or `legacy`.
        family: of a Hugging Face folder, or of the one that a checkpoint was imported from; None: not known.
        model: its shape.
        forms: every global tensor.
        read: rows of one.
        side_files: files that go along, by name.
        sources: the files that were read, for the journal.
        origins: where a tensor comes from, for messages.
    """

    kind: str
    family: str | None
    model: ModelConfig
    forms: Mapping[str, Form]
    read: Callable[[str, int, int], torch.Tensor]
    side_files: Mapping[str, Path] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> str:
        """What to call a tensor in a message."""
        return self.origins.get(name, name)

    def identity(self) -> list[Any]:
        """What tells that the source is the same one as before: names, sizes, times of change."""
        stats = [(str(path), path.stat()) for path in self.sources]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def open_source_checkpoint(
    path: Path, *, named_model: str | None = None, allow_pickle: bool = False, verify: Verify = "full"
) -> SourceCheckpoint:
    """Open a Hugging Face folder or a checkpoint of Megatron; the format is found out.

    Args:
        path: the folder; of a run directory its newest checkpoint is meant.
        named_model: a preset or a file with the model section, for checkpoints that do not say what they are.
        allow_pickle: of a Hugging Face folder: also read `.bin` files.
        verify: of a checkpoint of ours: how much of its checksums to compare, each before its file is read.

    Raises:
        UserError: there is nothing like that.
        RefusedError: it is damaged, or a model that cannot be converted.
    """
    from megatron_cpt.convert.megatron.legacy import LegacyWeights, is_legacy

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face folder or a checkpoint of Megatron")
    before_read: Callable[[Path], None] = take_as_it_is
    if is_checkpoint(path) or checkpoints_folder(path).is_dir():
        path = resolve_checkpoint(path)
        if verify != "none":
            before_read = FirstRead(path, verify)
    if find_torch_dist(path) is not None:
        weights = TorchDistWeights(path, before_read)
        files = sorted(weights.folder.iterdir())
        return _from_megatron("torch_dist", weights, path, weights.common(), named_model, files)
    if is_legacy(path):
        legacy = LegacyWeights(path)
        return _from_megatron("legacy", legacy, path, {"args": legacy.arguments}, named_model, legacy.files)
    if (path / CONFIG_FILE).exists():
        return _from_hugging_face(path, allow_pickle)
    raise RefusedError(
        f"{path}: neither a Hugging Face folder (config.json) nor a checkpoint of Megatron (.metadata, mp_rank_00/)"
    )


def _from_hugging_face(path: Path, allow_pickle: bool) -> SourceCheckpoint:
    folder = HfFolder(path, allow_pickle=allow_pickle)
    family, model = read_model(folder.config, path / CONFIG_FILE)
    rules = resolve(family, model)
    check_tensors(rules, folder.tensors, model, path)
    _check_tied(folder, model)
    by_name = {rule.megatron: rule for rule in rules}
    forms = {rule.megatron: Form(rule.megatron_shape, _common_dtype(rule, folder)) for rule in rules}

    def read(name: str, first: int, last: int) -> torch.Tensor:
        return by_name[name].megatron_rows(first, last, folder.read)

    origins = {
        rule.megatron: " and ".join(f"{name} in {folder.tensors[name].file}" for name in rule.hf) for rule in rules
    }
    sources = tuple(sorted({info.file for info in folder.tensors.values()}))
    return SourceCheckpoint("huggingface", family.name, model, forms, read, find_side_files(path), sources, origins)


def _common_dtype(rule: TensorRule, folder: HfFolder) -> torch.dtype:
    dtypes = {name: folder.tensors[name].dtype for name in rule.hf}
    if len(set(dtypes.values())) > 1:
        raise RefusedError(f"{folder.path}: of different types, but one tensor in Megatron: {dtypes}")
    return next(iter(dtypes.values()))


def _check_tied(folder: HfFolder, model: ModelConfig) -> None:
    """An output layer beside tied embeddings must be the embedding.

    Raises:
        RefusedError: it is another one, and would be lost.
    """
    for name, original in tied_copies(model).items():
        if name not in folder.tensors:
            continue
        rows = folder.tensors[name].shape[0]
        for first in range(0, rows, 8192):
            part = slice(first, min(rows, first + 8192))
            if not torch.equal(folder.read(name, part), folder.read(original, part)):
                raise RefusedError(
                    f"{folder.path}: {name} is not {original}, but config.json says tie_word_embeddings; "
                    "set it to false to keep both"
                )


def find_side_files(path: Path) -> dict[str, Path]:
    """Config, tokenizer and generation files of a Hugging Face folder; never weights, never code.

    Raises:
        RefusedError: one of them is a link that leads out of the folder.
    """
    found = {}
    for file in sorted(path.iterdir()):
        if not file.name.endswith(_HF_SUFFIXES) or file.name.endswith(".index.json") or file.name.startswith("."):
            continue
        real = Path(os.path.realpath(file))
        homes = {path.resolve(), path.resolve().parent.parent / "blobs"}  # the cache's snapshots/REVISION/NAME
        if real.parent not in homes:
            raise RefusedError(f"{file}: a link that leads out of the folder, to {real}; put the file in its place")
        if real.is_file() and real.stat().st_size <= _MAX_SIDE_FILE:
            found[file.name] = real
    return found


def _from_megatron(
    kind: str,
    weights: Weights,
    path: Path,
    common: Mapping[str, Any],
    named_model: str | None,
    files: list[Path],
) -> SourceCheckpoint:
    model = read_megatron_model(path, weights, common, named_model)
    expected = expected_tensors(model)
    check_accounted(path, weights, expected)
    forms = {name: Form(shape, weights.tensors[name].dtype) for name, shape in expected.items()}
    side = _kept_side_files(path) or _tokenizer_of_others(path)
    family = detect(read_json_object(side[CONFIG_FILE]), side[CONFIG_FILE]).name if CONFIG_FILE in side else None
    sources = tuple(file for file in files if file.is_file())
    return SourceCheckpoint(kind, family, model, forms, partial(_read_padded, weights, forms), side, sources)


def _kept_side_files(path: Path) -> dict[str, Path]:
    """The files that an import kept, in this checkpoint or in the one that its run began with."""
    for _ in range(8):  # a run that began with a run that began with ...
        if (path / HF_FOLDER).is_dir():
            return find_side_files(path / HF_FOLDER)
        origin = read_mapping(path / RUN_FILE).get("init") if (path / RUN_FILE).is_file() else None
        named = origin.get("from") if isinstance(origin, Mapping) else None
        if not isinstance(named, str):
            return {}
        if not Path(named).is_dir():
            logger.warning("%s: began with %s, which is not there: no tokenizer files come along", path, named)
            return {}
        path = resolve_checkpoint(named)
    return {}


def _tokenizer_of_others(path: Path) -> dict[str, Path]:
    """The tokenizer's files that Megatron-Bridge and NeMo 2 save with a checkpoint."""
    folders = [folder for folder in (newest_iteration(path), path) if folder is not None]
    for folder in (folder / name for folder in folders for name in _TOKENIZER_FOLDERS):
        if folder.is_dir():
            return find_side_files(folder)
    return {}


def check_accounted(path: object, weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Is every tensor of the model there, none besides, each of its shape? An embedding may have other padding.

    Raises:
        RefusedError: naming all that are not.
    """
    there = weights.tensors
    problems = [f"{name}: missing" for name in expected if name not in there]
    for name, tensor in there.items():
        shape = expected.get(name)
        if shape is None:
            problems.append(f"{name}: not a tensor of this model")
        elif name in (EMBEDDING, OUTPUT_LAYER) and tuple(tensor.shape[1:]) == shape[1:]:
            continue
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, but the model makes it {shape}")
    problems += [
        f"{name}: {tensor.dtype}; weights are read as fp32, bf16 or fp16"
        for name, tensor in there.items()
        if name in expected and tensor.dtype not in WEIGHT_DTYPES
    ]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise RefusedError("\n".join([f"{path}: {len(problems)} tensors do not fit:", *(f"  - {p}" for p in shown)]))


def _read_padded(weights: Weights, forms: Mapping[str, Form], name: str, first: int, last: int) -> torch.Tensor:
    """Rows of a tensor; rows of padding that the file lacks are zero."""
    there = weights.tensors[name].shape[0]
    part = weights.read(name, slice(first, min(last, there)) if first < there else slice(0, 0))
    if part.shape[0] == last - first:
        return part
    padded = torch.zeros((last - first, *forms[name].shape[1:]), dtype=part.dtype)
    padded[: part.shape[0]] = part
    return padded
