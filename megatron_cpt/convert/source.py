"""Source of a conversion: a model, its tensors by Megatron's global names, and the files that accompany it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.layout import checkpoints_folder, is_checkpoint, resolve_checkpoint
from megatron_cpt.checkpoint.loading.verify_while_reading import ShardVerifier
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, Verify, find_faults, shards_to_compare
from megatron_cpt.checkpoint.record import WeightSet, no_ema_error
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.huggingface.config import read_model
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE, HfFolder
from megatron_cpt.convert.huggingface.untrusted_json import read_json_object
from megatron_cpt.convert.mapping.families import detect
from megatron_cpt.convert.mapping.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    is_optimizer_tensor,
    optimizer_prefix,
    weight_name,
)
from megatron_cpt.convert.mapping.resolve import check_hf_tensors, refuse_wrong_tensors, resolve, tied_copies
from megatron_cpt.convert.mapping.rules import TensorRule
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.mapping.tensors import MosaicWeights
from megatron_cpt.convert.megatron.config import read_megatron_model
from megatron_cpt.convert.megatron.legacy import LegacyWeights, is_legacy
from megatron_cpt.convert.megatron.torch_dist_optimizer import is_padded, read_adam_state
from megatron_cpt.convert.megatron.torch_dist_plan import TensorSpec
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights, find_torch_dist
from megatron_cpt.convert.side_files import find_side_files, side_files_of_checkpoint
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.files.identity import FileIdentity, check_unchanged

_COMPARED_ROWS = 8192  # rows of tied embeddings that are in memory at the same time
_EMA_PREFIX = optimizer_prefix("ema")


@dataclass(frozen=True)
class SourceCheckpoint:
    """Opened source of a conversion, in any format.

    Attributes:
        kind: `huggingface`, `torch_dist` or `legacy`.
        family: name of the model's family; None if unknown.
        specs: shape and dtype of every global tensor.
        read: read(name, first, last) returns rows [first, last) of a tensor.
        side_files: config, tokenizer and generation files by name.
        sources: files with tensors.
        identities: of all files that the result depends on, from before the first of them was read.
        origins: descriptions of tensors for messages, such as `lm_head.weight in hf/model.safetensors`, by name.
        groups: the optimizer's parameter groups, if `specs` includes its tensors; None: weights only.
        common: what a Megatron checkpoint stores besides the tensors, such as Megatron-LM's `args`; the values are
            not checked.
        has_ema: True if the checkpoint also holds a moving average of its weights.
    """

    kind: str
    family: str | None
    model: ModelConfig
    specs: Mapping[str, TensorSpec]
    read: Callable[[str, int, int], torch.Tensor]
    side_files: Mapping[str, Path] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()
    identities: tuple[FileIdentity, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    has_ema: bool = False

    def identity(self) -> list[Any]:
        """Return names, sizes and modification times of the files, which tell work of another source apart."""
        return [[each.path, each.num_bytes, each.mtime_ns] for each in self.identities]


def open_source_checkpoint(
    path: Path,
    *,
    named_model: str | None = None,
    allow_pickle: bool = False,
    verify: Verify = "full",
    with_optimizer: bool = False,
    weights: WeightSet = "raw",
) -> SourceCheckpoint:
    """Open a Hugging Face folder or a Megatron checkpoint; the format is detected.

    Args:
        path: the folder. A run directory stands for its newest checkpoint.
        named_model: a preset or a YAML file with a model section, for checkpoints without a usable config.
        allow_pickle: also read `.bin` files of a Hugging Face folder.
        verify: share of the checksums of one of our checkpoints to compare, each before its file is read.
        with_optimizer: open moments, master weights and Adam's step as well.
        weights: `ema` opens the moving average of the weights, in fp32, in place of them; `specs` has their dtypes.

    Raises:
        UserError: the folder does not exist, `with_optimizer` is not possible for its format, or it has no average.
        RefusedError: it is corrupt, or holds a model that cannot be converted.
    """
    path = resolve_source(path)
    before = identify_folder(path)
    try:
        source = _open(path, named_model, allow_pickle, verify, with_optimizer, weights)
    except CptError:
        check_unchanged(before.values())  # a file that was cut a moment ago looks corrupt
        raise
    files = [*source.sources, *source.side_files.values()]
    return replace(source, identities=tuple(before.get(file.resolve()) or FileIdentity.read(file) for file in files))


def resolve_source(path: Path) -> Path:
    """Return the folder to convert: a run directory stands for its newest checkpoint.

    Raises:
        UserError: the folder does not exist.
        RefusedError: it is a run directory without a checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face folder or a Megatron checkpoint")
    return resolve_checkpoint(path) if is_checkpoint(path) or checkpoints_folder(path).is_dir() else path


def identify_folder(path: Path) -> dict[Path, FileIdentity]:
    """Return the identities of all files below a folder, by their paths with links resolved."""
    return {file.resolve(): FileIdentity.read(file) for file in path.rglob("*") if file.is_file()}


def _open(
    path: Path, named_model: str | None, allow_pickle: bool, verify: Verify, with_optimizer: bool, kind: WeightSet
) -> SourceCheckpoint:
    before_read = None
    if is_checkpoint(path) and verify != "none":
        before_read = verify_before_read(path, verify)
    if find_torch_dist(path) is not None:
        weights = TorchDistWeights(path, before_read)
        files = sorted(weights.folder.iterdir())
        common = weights.common()
        source = _from_megatron("torch_dist", weights, path, common, named_model, files)
        names = weights.keys()
        source = replace(source, has_ema=any(name.startswith(_EMA_PREFIX) for name in names))
        if kind == "ema":
            source = _take_ema(source, weights, path)
        return _add_optimizer(source, weights, common) if with_optimizer else source
    if kind == "ema":
        raise no_ema_error(path)
    if with_optimizer:
        raise UserError(f"--optimizer: {path}: only torch_dist checkpoints are read with their optimizer; omit it")
    if is_legacy(path):
        legacy = LegacyWeights(path)
        return _from_megatron("legacy", legacy, path, legacy.common, named_model, legacy.files)
    if (path / CONFIG_FILE).exists():
        return _from_hugging_face(path, allow_pickle)
    raise RefusedError(
        f"{path}: neither a Hugging Face folder (config.json) nor a Megatron checkpoint (.metadata, mp_rank_00/); "
        "give the folder that contains one of these"
    )


def verify_before_read(checkpoint: Path, how: Verify) -> Callable[[Path], None]:
    """Verify all but the shards of a checkpoint; return a function that verifies a shard before its first read.

    Raises:
        CorruptCheckpointError: a file is missing, has another size or is corrupt; also from the returned function.
    """
    if faults := find_faults(checkpoint, how, with_shards=False):
        raise CorruptCheckpointError(checkpoint, faults)
    return ShardVerifier(checkpoint, shards_to_compare(checkpoint, how), on_demand=True).verify


def _from_hugging_face(path: Path, allow_pickle: bool) -> SourceCheckpoint:
    folder = HfFolder(path, allow_pickle=allow_pickle)
    family, model = read_model(folder.config, path / CONFIG_FILE)
    rules = {rule.megatron: rule for rule in resolve(family, model)}
    check_hf_tensors(rules.values(), folder.tensors, model, path)
    _refuse_untied_copies(folder, model)
    return SourceCheckpoint(
        kind="huggingface",
        family=family.name,
        model=model,
        specs={name: TensorSpec(rule.megatron_shape, _common_dtype(rule, folder)) for name, rule in rules.items()},
        read=lambda name, first, last: rules[name].megatron_rows(first, last, folder.read),
        side_files=find_side_files(path),
        sources=tuple(sorted({info.file for info in folder.tensors.values()})),
        origins={
            name: " and ".join(f"{hf_name} in {folder.tensors[hf_name].file}" for hf_name in rule.hf)
            for name, rule in rules.items()
        },
    )


def _common_dtype(rule: TensorRule, folder: HfFolder) -> torch.dtype:
    dtypes = {name: folder.tensors[name].dtype for name in rule.hf}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise RefusedError(f"{folder.path}: {found}, but they form one tensor in Megatron; cast them to one dtype")
    return next(iter(dtypes.values()))


def _refuse_untied_copies(folder: HfFolder, model: ModelConfig) -> None:
    """Raise if a file of a tied model has an output layer that differs from the embedding, since it would be lost."""
    for name, original in tied_copies(model).items():
        if name not in folder.tensors:
            continue
        num_rows = folder.tensors[name].shape[0]
        for first in range(0, num_rows, _COMPARED_ROWS):
            rows = slice(first, min(num_rows, first + _COMPARED_ROWS))
            if not torch.equal(folder.read(name, rows), folder.read(original, rows)):
                raise RefusedError(
                    f"{folder.path}: {name} differs from {original}, but config.json has tie_word_embeddings: true; "
                    "set it to false to keep both"
                )


def _from_megatron(
    kind: str,
    weights: MosaicWeights,
    path: Path,
    common: Mapping[str, Any],
    named_model: str | None,
    files: list[Path],
) -> SourceCheckpoint:
    model = read_megatron_model(path, weights, common, named_model)
    expected = expected_tensors(model)
    refuse_wrong_tensors(path, weights.tensors, expected, padded=(EMBEDDING, OUTPUT_LAYER))
    specs = {name: TensorSpec(shape, weights.tensors[name].dtype) for name, shape in expected.items()}
    side = side_files_of_checkpoint(path)
    return SourceCheckpoint(
        kind=kind,
        family=detect(read_json_object(side[CONFIG_FILE]), side[CONFIG_FILE]).name if CONFIG_FILE in side else None,
        model=model,
        specs=specs,
        read=partial(_read_with_padding, weights, specs),
        side_files=side,
        sources=tuple(file for file in files if file.is_file()),
        common=common,
    )


def _add_optimizer(source: SourceCheckpoint, weights: TorchDistWeights, common: Mapping[str, Any]) -> SourceCheckpoint:
    """Return the source with moments and master weights among its tensors.

    Rows of padding are zero in all of them: a moment there would move weights that no gradient reaches.
    """
    model = source.model
    adam = read_adam_state(weights, common, {name: spec.shape for name, spec in source.specs.items()})
    shapes = {name: source.specs[weight_name(name)].shape for name in adam.tensors.tensors}
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}

    def read(name: str, first: int, last: int) -> torch.Tensor:
        if is_optimizer_tensor(name):
            rows = _read_with_padding(adam.tensors, specs, name, first, last)
        else:
            rows = source.read(name, first, last)
        if is_padded(name) and not model.padding_in_softmax:
            rows[max(0, model.vocab - first) :] = 0
        return rows

    return replace(source, specs={**source.specs, **specs}, read=read, groups=adam.groups)


def _take_ema(source: SourceCheckpoint, weights: TorchDistWeights, path: Path) -> SourceCheckpoint:
    """Return the source with the moving average of its weights in place of them."""
    if not source.has_ema:
        raise no_ema_error(path)
    averages = {name.removeprefix(_EMA_PREFIX): mosaic for name, mosaic in weights.collect(_EMA_PREFIX).items()}
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    refuse_wrong_tensors(path, averages, shapes, padded=(EMBEDDING, OUTPUT_LAYER))
    return replace(source, read=partial(_read_with_padding, MosaicWeights(averages), source.specs))


def _read_with_padding(
    weights: MosaicWeights, specs: Mapping[str, TensorSpec], name: str, first: int, last: int
) -> torch.Tensor:
    """Return rows of a tensor; rows of padding that the file lacks are zero.

    Example: a file with 257 rows of an embedding that this package pads to 384. Rows 256 to 259 are one row of the
    file and two rows of zeros.
    """
    stored_rows = weights.tensors[name].shape[0]
    stored = weights.read(name, slice(min(first, stored_rows), min(last, stored_rows)))
    if stored.shape[0] == last - first:
        return stored
    padded = torch.zeros((last - first, *specs[name].shape[1:]), dtype=stored.dtype)
    padded[: stored.shape[0]] = stored
    return padded
