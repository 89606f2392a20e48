"""A checkpoint -> a Hugging Face folder: streamed, resumable, published by one rename."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from megatron_cpt.checkpoint.manifest import Verify
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.huggingface.config import matching, read_model, to_hf_config
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE, read_json_object
from megatron_cpt.convert.huggingface.writer import DEFAULT_SHARD_BYTES, HfWriter, work_folder
from megatron_cpt.convert.job import (
    DTYPES,
    Advance,
    cast,
    check_space,
    check_target,
    os_errors_as_cpt_errors,
    reserved,
    run_parallel,
    silent,
)
from megatron_cpt.convert.mapping.families import Family, by_name, detect
from megatron_cpt.convert.mapping.resolve import TensorRule, resolve
from megatron_cpt.convert.source import SourceCheckpoint, find_side_files, open_source_checkpoint
from megatron_cpt.errors import RefusedError, UserError

BLOCK_BYTES = 16 << 20
"""Rows that are in memory at a time, a thread; see `torch_dist_plan.MAX_PIECE_BYTES`."""

_HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`; None: as it is.
        shard_bytes: of a safetensors file.
        workers: threads; 0: all cores.
        family: where neither the checkpoint nor the model says it.
        files: a folder with config, tokenizer and generation files; None: those that an import kept.
        model: a preset or file that says what a checkpoint of Megatron is.
        verify: how much of the checkpoint's checksums to compare, each before its file is read: full, sampled or none.
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    workers: int = 0
    family: str | None = None
    files: Path | None = None
    model: str | None = None
    verify: Verify = "full"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        family: that it was exported as.
        num_tensors, num_bytes: written.
        num_kept: tensors of an earlier call that were kept.
        side_files: names of the files that came along.
        seconds: it took.
    """

    family: str
    num_tensors: int
    num_bytes: int
    num_kept: int
    side_files: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TensorBlock:
    """Rows of a Hugging Face tensor, the unit of work."""

    rule: TensorRule
    name: str
    first: int
    last: int


def export_checkpoint(
    source: Path, target: Path, options: ExportOptions | None = None, *, advance: Advance = silent
) -> ExportReport:
    """Export a checkpoint of ours, a run's newest one, or a checkpoint of Megatron.

    Raises:
        UserError: the source is not there, the target is, or the disk is too small.
        RefusedError: the source is damaged, or no model of the family.
        CptError: the system fails in the middle: a full disk, a limit, a file that is gone.
    """
    options = options or ExportOptions()
    check_target(target)
    with os_errors_as_cpt_errors(work_folder(target)):
        return _export(source, target, options, advance)


def _export(source: Path, target: Path, options: ExportOptions, advance: Advance) -> ExportReport:
    started = time.perf_counter()
    incoming = open_source(source, model=options.model, verify=options.verify)
    side = find_side_files(options.files) if options.files is not None else dict(incoming.side_files)
    family = find_family(incoming, side, options.family)
    rules = resolve(family, incoming.model)
    dtypes = {rule.megatron: _final_dtype(incoming, rule, options.dtype) for rule in rules}
    shapes = {
        name: (shape, dtypes[rule.megatron])
        for rule in rules
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    aside = work_folder(target)
    with reserved(target, aside):
        check_space(target.parent, total, aside)
        with closing(HfWriter(target, shapes, options.shard_bytes, source=repr(incoming.identity()))) as writer:
            _write_tensors(incoming, rules, dtypes, writer, options.workers or os.cpu_count() or 1, advance)
            names = _write_side_files(writer.folder, family, incoming.model, side, dtypes)
            writer.finish()
    return ExportReport(family.name, len(shapes), total, len(writer.done), names, time.perf_counter() - started)


def open_source(path: Path, *, model: str | None = None, verify: Verify = "full") -> SourceCheckpoint:
    """Open a checkpoint; one of ours is verified first.

    Raises:
        UserError: there is nothing like that.
        RefusedError: it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run directory")
    incoming = open_source_checkpoint(path, named_model=model, verify=verify)
    if incoming.kind == "huggingface":
        raise UserError(f"{path}: a Hugging Face folder already; give a checkpoint")
    return incoming


def find_family(incoming: SourceCheckpoint, side: Mapping[str, Path], named: str | None) -> Family:
    """The family to export as: the named one, the one it was imported from, or the first that can express it.

    Raises:
        UserError: the name is not known.
        RefusedError: no family can express the model.
    """
    if named is not None:
        return by_name(named)
    if CONFIG_FILE in side:
        return read_model(read_json_object(side[CONFIG_FILE]), side[CONFIG_FILE])[0]
    if incoming.family is not None:
        return by_name(incoming.family)
    found = matching(incoming.model)
    if not found:
        raise RefusedError("no Hugging Face family has this model's norm, activation and biases; name one: --family")
    return found[0]


def blocks(rules: list[TensorRule], itemsize: int = 4) -> Iterator[TensorBlock]:
    """All rows of all Hugging Face tensors, in parts that fit into memory."""
    for rule in rules:
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
            for first in range(0, shape[0], step):
                yield TensorBlock(rule, name, first, min(shape[0], first + step))


def read_block(incoming: SourceCheckpoint, block: TensorBlock) -> torch.Tensor:
    """The rows of a Hugging Face tensor, put together from a checkpoint."""
    return block.rule.hf_rows(
        block.name, block.first, block.last, lambda name, rows: incoming.read(name, rows.start, rows.stop)
    )


def _final_dtype(incoming: SourceCheckpoint, rule: TensorRule, dtype: str | None) -> torch.dtype:
    return DTYPES[dtype] if dtype is not None else incoming.forms[rule.megatron].dtype


def _write_tensors(
    incoming: SourceCheckpoint,
    rules: list[TensorRule],
    dtypes: Mapping[str, torch.dtype],
    writer: HfWriter,
    workers: int,
    advance: Advance,
) -> None:
    kept = [
        math.prod(shape) * dtypes[rule.megatron].itemsize
        for rule in rules
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
        if name in writer.done
    ]
    advance(sum(kept), writer.total_bytes)

    def work(block: TensorBlock) -> None:
        rows = cast(block.name, read_block(incoming, block), dtypes[block.rule.megatron])
        writer.write_rows(block.name, block.first, rows)
        advance(rows.nbytes, writer.total_bytes)

    run_parallel(work, [block for block in blocks(rules) if block.name not in writer.done], workers)


def _write_side_files(
    folder: Path, family: Family, model: ModelConfig, side: Mapping[str, Path], dtypes: Mapping[str, torch.dtype]
) -> list[str]:
    """Tokenizer and generation files as they came, and a config.json that says what the weights are now."""
    dtype = _HF_DTYPES[next(iter(dtypes.values()))]
    config = _kept_config(family, side)
    if config and _still_true(config, side[CONFIG_FILE], model, dtype):
        shutil.copyfile(side[CONFIG_FILE], folder / CONFIG_FILE)
    else:
        config |= to_hf_config(family, model, dtype)
        config.pop("dtype", None)  # the newer name of torch_dtype
        (folder / CONFIG_FILE).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    for name, file in side.items():
        if name != CONFIG_FILE:
            shutil.copyfile(file, folder / name)
    return sorted({*side, CONFIG_FILE})


def _kept_config(family: Family, side: Mapping[str, Path]) -> dict[str, Any]:
    """The config.json that came along, unless the model is exported as another family."""
    config = read_json_object(side[CONFIG_FILE]) if CONFIG_FILE in side else {}
    return config if config and detect(config, side[CONFIG_FILE]) is family else {}


def _still_true(config: dict[str, Any], file: Path, model: ModelConfig, dtype: str) -> bool:
    _, there = read_model(config, file)
    notes = {"preset", "init_std", "attention_dropout", "hidden_dropout"}
    if model.max_positions is None:  # the run does not say it
        notes.add("max_positions")
    same = there.model_dump(exclude=notes) == model.model_dump(exclude=notes)
    return same and config.get("dtype", config.get("torch_dtype", dtype)) == dtype
