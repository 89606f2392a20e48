"""Pretraining of a checkpoint: the model's architecture, and what the checkpoint records of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.layout import is_checkpoint
from megatron_cpt.checkpoint.record import SavedRun, read_saved_run
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE
from megatron_cpt.convert.side_files import TOKENIZER_FILES
from megatron_cpt.convert.source import SourceCheckpoint, open_source_checkpoint, resolve_source
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.checkpoint_tokenizer import find_tokenizer
from megatron_cpt.recipe.commented_yaml import Reasoned


@dataclass(frozen=True)
class TrainingRecord:
    """Settings that a checkpoint records of its training; None: not recorded.

    Attributes:
        last_rate: learning rate of the step after the last one; after a finished run its smallest rate.
        global_batch: sequences per step.
    """

    last_rate: Reasoned[float] | None = None
    seq_length: Reasoned[int] | None = None
    global_batch: Reasoned[int] | None = None
    betas: Reasoned[list[float]] | None = None
    eps: Reasoned[float] | None = None
    weight_decay: Reasoned[float] | None = None
    clip_grad: Reasoned[float] | None = None


@dataclass(frozen=True)
class Pretraining:
    """Pretrained model that a run continues.

    Attributes:
        path: the checkpoint, a run's newest one.
        can_start: the path can stand in `init.from`; if False, it must be imported first.
        name: name for the run and for the imported checkpoint.
        model_source: file that describes the model, for comments.
        tokenizer: KIND:PATH, if the checkpoint has its tokenizer.
    """

    path: Path
    can_start: bool
    name: str
    model: ModelConfig
    model_source: str
    tokenizer: Reasoned[str] | None
    record: TrainingRecord


def read_pretraining(
    path: Path, *, named_model: str | None = None, allow_pickle: bool = False, tokenizer: str | None = None
) -> Pretraining:
    """Read a Hugging Face folder, a Megatron checkpoint, one of our checkpoints, or a run directory.

    Args:
        named_model: a preset or a YAML file with a model section, for checkpoints without a usable config.
        allow_pickle: accept `.bin` files of a Hugging Face folder.
        tokenizer: KIND:PATH of another tokenizer.

    Raises:
        UserError: the folder does not exist, or its model is unknown.
        RefusedError: it is corrupt, or holds a model that cannot be trained here.
    """
    opened = open_source_checkpoint(path, named_model=named_model, allow_pickle=allow_pickle)
    resolved = resolve_source(path)
    saved = read_saved_run(resolved) if is_checkpoint(resolved) else None
    given = Reasoned(tokenizer, "given by --tokenizer") if tokenizer is not None else None
    if saved is not None:
        name = str(saved.run.get("name") or resolved.name)
        model_source = f"run.yaml of {resolved}"
    else:
        name = resolved.resolve().name
        model_source = f"{CONFIG_FILE} of {path}" if opened.kind == "huggingface" else f"arguments stored in {path}"
    if named_model is not None:
        model_source = f"--model {named_model}"
    return Pretraining(
        path=resolved,
        can_start=saved is not None,
        name=name,
        model=opened.model,
        model_source=model_source,
        tokenizer=given or (_own_tokenizer(saved) if saved is not None else _tokenizer_beside(opened, path)),
        record=_record_of_run(saved) if saved is not None else _record_of_megatron(opened.common, path),
    )


def _own_tokenizer(saved: SavedRun) -> Reasoned[str] | None:
    try:
        return Reasoned(find_tokenizer(saved), f"the tokenizer of {saved.path}")
    except UserError:  # the sidecars of the data may name it
        return None


def _tokenizer_beside(opened: SourceCheckpoint, path: Path) -> Reasoned[str] | None:
    for name, kind in TOKENIZER_FILES.items():
        if name in opened.side_files:
            folder = path if opened.kind == "huggingface" else opened.side_files[name].parent
            spec = f"{kind}:{folder if kind == 'huggingface' else folder / name}"
            return Reasoned(spec, f"{name} beside the weights")
    return None


def _record_of_run(saved: SavedRun) -> TrainingRecord:
    """Return the settings of the run that saved a checkpoint, or of the checkpoint that it was imported from."""
    imported = saved.state.get("imported")
    if isinstance(imported, Mapping):
        origin = Path(str(imported.get("from")))
        if imported.get("kind") == "huggingface" or not origin.is_dir():
            return TrainingRecord()
        if is_checkpoint(resolve_source(origin)):
            return _record_of_run(read_saved_run(resolve_source(origin)))
        return _record_of_megatron(open_source_checkpoint(origin).common, origin)
    where = f"recorded in run.yaml of {saved.path}"
    optimizer = _mapping(saved.run.get("optimizer"))
    betas = optimizer.get("betas")
    rate = _number(saved.state.get("next_rate"), float)
    step = _mapping(saved.state.get("train")).get("step")
    return TrainingRecord(
        last_rate=Reasoned(rate, f"rate after step {step} in state.json of {saved.path}") if rate else None,
        seq_length=_recorded(saved.run.get("seq_length"), int, where),
        global_batch=_recorded(_mapping(saved.run.get("batch")).get("global"), int, where),
        betas=_betas(*betas, where=where) if isinstance(betas, list) and len(betas) == 2 else None,
        eps=_recorded(optimizer.get("eps"), float, where),
        weight_decay=_recorded(optimizer.get("weight_decay"), float, where),
        clip_grad=_recorded(optimizer.get("clip_grad"), float, where),
    )


def _record_of_megatron(common: Mapping[str, Any], path: Path) -> TrainingRecord:
    """Return what Megatron-LM's arguments and the optimizer's parameter groups record."""
    arguments = common.get("args")
    fields = _mapping(arguments if isinstance(arguments, Mapping) else getattr(arguments, "state", None))
    where = f"recorded in the arguments of {path}"
    rate = _last_rate(common)
    return TrainingRecord(
        last_rate=Reasoned(rate, f"rate of the optimizer's parameter groups in {path}") if rate else None,
        seq_length=_recorded(fields.get("seq_length"), int, where),
        global_batch=_recorded(fields.get("global_batch_size"), int, where),
        betas=_betas(fields.get("adam_beta1"), fields.get("adam_beta2"), where=where),
        eps=_recorded(fields.get("adam_eps"), float, where),
        weight_decay=_recorded(fields.get("weight_decay"), float, where),
        clip_grad=_recorded(fields.get("clip_grad"), float, where),
    )


def _last_rate(common: Mapping[str, Any]) -> float | None:
    """Return the rate that Megatron-LM's scheduler has set for the next step; the largest over all groups."""
    state = _mapping(common.get("optimizer"))
    groups = _mapping(state.get("optimizer", state)).get("param_groups")
    rates = [_number(_mapping(group).get("lr"), float) for group in (groups if isinstance(groups, list) else [])]
    largest: float = max((rate for rate in rates if rate), default=0.0)
    if largest:
        return largest
    schedule = _mapping(common.get("opt_param_scheduler"))
    done, end = (_number(schedule.get(key), float) for key in ("num_steps", "lr_decay_steps"))
    least: float | None = _number(schedule.get("min_lr"), float)
    return least if done and end and done >= end else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, kind: type) -> Any:
    """Return a positive number of a type, None for anything else: the file is not ours to trust."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return None
    return value if kind is float else int(value) if int(value) == value else None


def _recorded(value: Any, kind: type, where: str) -> Reasoned[Any] | None:
    number = _number(value, kind)
    return None if number is None else Reasoned(number, where)


def _betas(first: Any, second: Any, *, where: str) -> Reasoned[list[float]] | None:
    if not all(isinstance(beta, float) and 0 <= beta < 1 for beta in (first, second)):
        return None
    return Reasoned([first, second], where)
