"""Export of a checkpoint as a Hugging Face folder: streamed, resumable, published by one rename."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from megatron_cpt.checkpoint.layout import checkpoints_folder, is_checkpoint, resolve_checkpoint
from megatron_cpt.checkpoint.manifest import Verify
from megatron_cpt.checkpoint.record import WeightSet, read_run
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.dtypes import cast, find_dtype
from megatron_cpt.convert.huggingface.config import matching, read_model, to_hf_config
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE
from megatron_cpt.convert.huggingface.untrusted_json import read_json_object
from megatron_cpt.convert.huggingface.writer import DEFAULT_SHARD_BYTES, HfWriter, TensorSizes, work_folder
from megatron_cpt.convert.job import Advance, no_progress, refuse_existing, run_parallel
from megatron_cpt.convert.mapping.families import Family, by_name, detect
from megatron_cpt.convert.mapping.resolve import resolve
from megatron_cpt.convert.mapping.rules import TensorRule
from megatron_cpt.convert.model_card import write_model_card
from megatron_cpt.convert.side_files import find_side_files
from megatron_cpt.convert.source import SourceCheckpoint, open_source_checkpoint, resolve_source
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import identify, must_not_change
from megatron_cpt.files.output_path import refuse_output_inside
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.files.whole_io import copy_file, write_content

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20
"""Bytes of a tensor that one thread holds in memory; see `torch_dist_plan.MAX_PIECE_BYTES`."""

GENERATION_FILE = "generation_config.json"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id")
_HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export; the defaults suit every checkpoint that was imported from Hugging Face.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`; None: keep the dtype of each tensor.
        shard_bytes: size of a safetensors file.
        workers: number of threads; 0: one per core.
        family: family to export as; None: the family that the model was imported as, or the first that fits it.
        files: folder with config, tokenizer and generation files; None: the files that the import kept.
        model: a preset, or a YAML file with a model section, for Megatron checkpoints without a usable config.
        verify: share of the checkpoint's checksums to compare, each before its file is read: `full`, `sampled` or
            `none`.
        weights: `ema`: the moving average of the weights, in the dtype of the weights unless `dtype` says otherwise.
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    workers: int = 0
    family: str | None = None
    files: Path | None = None
    model: str | None = None
    verify: Verify = "full"
    weights: WeightSet = "raw"


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        family: family that the model was exported as.
        num_tensors, num_bytes: size of the model as written.
        num_kept: number of tensors that an interrupted earlier call had written.
        side_files: names of the config, tokenizer and generation files.
    """

    family: str
    num_tensors: int
    num_bytes: int
    num_kept: int
    side_files: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TensorBlock:
    """Rows [first, last) of a Hugging Face tensor: the unit of work of an export."""

    rule: TensorRule
    name: str
    first: int
    last: int


def export_checkpoint(
    source: str | Path, target: str | Path, options: ExportOptions | None = None, *, advance: Advance = no_progress
) -> ExportReport:
    """Export a checkpoint as a Hugging Face folder.

    The target appears only when it is complete and on the disk. Call the function again with the same arguments to
    resume an interrupted export. Example:

        export_checkpoint("runs/my-run", "hf/my-model", ExportOptions(dtype="bf16"))

    Args:
        source: a checkpoint, a run directory (its newest checkpoint), or a Megatron checkpoint.
        target: the folder to create; it must not exist.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: the source does not exist or has no moving average, the target exists or is inside it, or the
            disk is too small.
        RefusedError: the source is corrupt or changes while it is read, or no family can express its model.
        CptError: the operating system failed, for example with a full disk.
    """
    source, target, options = Path(source), Path(target), options or ExportOptions()
    refuse_existing(target)
    with os_errors_as_cpt_errors(work_folder(target)):
        started = time.perf_counter()
        refuse_output_inside(target, resolve_source(source))
        checkpoint = open_checkpoint(source, model=options.model, verify=options.verify, weights=options.weights)
        side = find_side_files(Path(options.files)) if options.files is not None else dict(checkpoint.side_files)
        identities = identify(side.values())
        family = _choose_family(checkpoint, side, options.family)
        rules = resolve(family, checkpoint.model)
        dtype = find_dtype(options.dtype)
        tensors = {
            name: (shape, dtype or checkpoint.specs[rule.megatron].dtype)
            for rule in rules
            for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
        }
        with HfWriter(
            target, tensors, options.shard_bytes, source=repr((options.weights, checkpoint.identity()))
        ) as writer:
            with must_not_change([*checkpoint.identities, *identities]):
                _write_tensors(checkpoint, rules, tensors, writer, options.workers, advance)
                config_dtype = _HF_DTYPES[next(iter(tensors.values()))[1]]
                own = _own_checkpoint(source)
                eod_id = (read_run(own).get("documents") or {}).get("eod_id") if is_checkpoint(own) else None
                names = _write_side_files(writer.folder, family, checkpoint.model, side, config_dtype, eod_id)
                names = sorted({*names, *write_model_card(writer.folder, own, side, options.weights)})
            writer.finish()
    return ExportReport(
        family=family.name,
        num_tensors=len(tensors),
        num_bytes=writer.total_bytes,
        num_kept=len(writer.done),
        side_files=names,
        seconds=time.perf_counter() - started,
    )


def open_checkpoint(
    path: Path, *, model: str | None = None, verify: Verify = "full", weights: WeightSet = "raw"
) -> SourceCheckpoint:
    """Open a checkpoint to export or compare, see `open_source_checkpoint`; refuse a Hugging Face folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run directory")
    checkpoint = open_source_checkpoint(path, named_model=model, verify=verify, weights=weights)
    if checkpoint.kind == "huggingface":
        raise UserError(f"{path}: a Hugging Face folder already; give a checkpoint or a run directory")
    return checkpoint


def _own_checkpoint(source: Path) -> Path:
    """Return the checkpoint that a run directory stands for; other folders are returned unchanged."""
    return resolve_checkpoint(source) if checkpoints_folder(source).is_dir() else source


def blocks(rules: list[TensorRule], itemsize: int = 4) -> Iterator[TensorBlock]:
    """Yield all rows of all Hugging Face tensors, in parts of at most `BLOCK_BYTES`."""
    for rule in rules:
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
            for first in range(0, shape[0], step):
                yield TensorBlock(rule, name, first, min(shape[0], first + step))


def read_block(checkpoint: SourceCheckpoint, block: TensorBlock) -> torch.Tensor:
    """Return rows of a Hugging Face tensor, assembled from a checkpoint."""
    return block.rule.hf_rows(
        block.name, block.first, block.last, lambda name, rows: checkpoint.read(name, rows.start, rows.stop)
    )


def _choose_family(checkpoint: SourceCheckpoint, side: Mapping[str, Path], named: str | None) -> Family:
    """Return the named family, the family that the model was imported as, or the first that can express it."""
    if named is not None:
        return by_name(named)
    if CONFIG_FILE in side:
        return read_model(read_json_object(side[CONFIG_FILE]), side[CONFIG_FILE])[0]
    if checkpoint.family is not None:
        return by_name(checkpoint.family)
    found = matching(checkpoint.model)
    if not found:
        raise RefusedError(
            "model: no Hugging Face family has its combination of norm, activation and biases, so transformers could "
            "not load an export; --family NAME shows what differs from a family"
        )
    return found[0]


def _write_tensors(
    checkpoint: SourceCheckpoint,
    rules: list[TensorRule],
    tensors: TensorSizes,
    writer: HfWriter,
    workers: int,
    advance: Advance,
) -> None:
    kept_bytes = sum(math.prod(tensors[name][0]) * tensors[name][1].itemsize for name in writer.done)
    advance(kept_bytes, writer.total_bytes)

    def write(block: TensorBlock) -> None:
        rows = cast(block.name, read_block(checkpoint, block), tensors[block.name][1])
        writer.write_rows(block.name, block.first, rows)
        advance(rows.nbytes, writer.total_bytes)

    run_parallel(write, [block for block in blocks(rules) if block.name not in writer.done], workers)


def _write_side_files(
    folder: Path, family: Family, model: ModelConfig, side: Mapping[str, Path], dtype: str, eod_id: int | None
) -> list[str]:
    """Copy tokenizer and generation files, and write a config.json that describes the exported weights.

    Keys of the original config.json that the model section has no field for are kept. If nothing has changed, the
    original file is copied byte for byte.
    """
    for name, file in side.items():
        if name != CONFIG_FILE:
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(file, folder / name)
    config = read_json_object(side[CONFIG_FILE]) if CONFIG_FILE in side else {}
    ids = {key: config[key] for key in _SPECIAL_IDS if key in config} if config else _special_ids(folder, model, eod_id)
    names = {*side, CONFIG_FILE}
    if config and detect(config, side[CONFIG_FILE]) is not family:
        config = {}  # exported as another family, whose keys have other meanings
    if config and _is_up_to_date(config, side[CONFIG_FILE], model, dtype):
        copy_file(side[CONFIG_FILE], folder / CONFIG_FILE)
    else:
        config |= {**to_hf_config(family, model, dtype), **ids}
        config.pop("dtype", None)  # the newer name of torch_dtype
        if "layer_types" in config:  # one entry per layer; only models with full attention are converted
            config["layer_types"] = ["full_attention"] * model.layers
        write_content(folder / CONFIG_FILE, orjson.dumps(config, option=orjson.OPT_INDENT_2))
    if GENERATION_FILE not in side and CONFIG_FILE not in side and any(value is not None for value in ids.values()):
        write_content(folder / GENERATION_FILE, orjson.dumps(ids, option=orjson.OPT_INDENT_2))
        names.add(GENERATION_FILE)
    return sorted(names)


def _special_ids(folder: Path, model: ModelConfig, eod_id: int | None) -> dict[str, int | None]:
    """Return the ids that begin and end a document, by the tokenizer in an exported folder and `documents.eod_id`.

    They are null if unknown: without the keys transformers takes the defaults of a class, such as 1 and 2 for Llama.
    """
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": eod_id}
    kinds = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}
    kind = next((kind for name, kind in kinds.items() if (folder / name).is_file()), None)
    if kind is None:
        return ids
    try:
        tokenizer = load_tokenizer(f"{kind}:{folder}")
    except (UserError, ImportError) as error:
        logger.warning("config.json has no ids that begin and end a document: %s", error)
        return ids
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id if eod_id is None else eod_id}
    return {key: value if value is not None and value < model.vocab else None for key, value in found.items()}


def _is_up_to_date(config: dict[str, Any], file: Path, model: ModelConfig, dtype: str) -> bool:
    """Return whether a config.json describes the weights for transformers 4 and 5 alike.

    transformers 4 does not know `rope_parameters`: it ignores them and computes with its defaults, silently.
    """
    if "rope_parameters" in config and "rope_theta" not in config:
        return False
    _, original = read_model(config, file)
    ignored = {"preset", "init_std", "attention_dropout", "hidden_dropout", "padding_in_softmax"}
    if model.max_positions is None:
        ignored.add("max_positions")
    is_same_model = original.model_dump(exclude=ignored) == model.model_dump(exclude=ignored)
    return is_same_model and config.get("dtype", config.get("torch_dtype", dtype)) == dtype
