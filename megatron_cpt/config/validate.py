"""Validation of plain data into a `RunConfig`, with one message per problem.

Rules between fields need a valid `RunConfig`. Invalid values are therefore replaced by stand-ins and the data is
validated again. The keys of the stand-ins are returned as `tainted`, so that rules which read them are skipped: with
`model: {heads: "8", kv_groups: 3}` only the type of `heads` is reported, not that 3 does not divide it.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_cpt.config.fields import Path, dotted, key_help, key_path, nearest_key
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.errors import ConfigError

_MAX_PASSES = 8
_Model = TypeVar("_Model", bound=BaseModel)

_MODEL = {"layers": 1, "hidden": 8, "ffn_hidden": 8, "heads": 1, "vocab": 8}

# Values for required keys, which have no default. No rule between fields fails because of them alone.
_STAND_INS: dict[str, Any] = {
    "name": "run",
    "output": "runs/run",
    "model": _MODEL,
    **{f"model.{key}": value for key, value in _MODEL.items()},
    "seq_length": 8,
    "batch": {"global": 1},
    "batch.global": 1,
    "tokens": 8,
    "schedule": {"max_lr": 1.0},
    "schedule.max_lr": 1.0,
    "optimizer.betas[*]": 0.9,
    "sources": {"source": {"path": "source"}},
    "sources.*": {"path": "source"},
    "sources.*.path": "source",
    "sources.*.path[*]": "source",
    "phases": [{"name": "phase", "blend": {"source": 1.0}}],
    "phases[*]": {"name": "phase", "blend": {"source": 1.0}},
    "phases[*].name": "phase",
    "phases[*].blend": {"source": 1.0},
    "phases[*].blend.*": 1.0,
    "validation.sources.*": "source",
    "validation.sources.*[*]": "source",
    "evaluation.tasks": ["task"],
    "evaluation.tasks[*]": "task",
    "evaluation.at[*]": "end",
    "log.wandb.project": "project",
    "log.hooks[*]": "module:Class",
    "profile.steps": [1, 1],
    "profile.steps[*]": 1,
    "profile.ranks[*]": 0,
}
# Sections to replace as a whole if one entry is invalid: without the entry they would mean something else.
_REPLACED_AS_A_WHOLE = (
    "batch.ramp_up",
    "schedule.warmup",
    "schedule.decay",
    "phases[*].until",
    "validation",
    "sources.*.fim",
    "teacher",
)

_REASONS = {
    "string_type": "not text; put it in quotes",
    "int_type": "not a whole number; write digits without quotes",
    "int_from_float": "not a whole number; remove the fraction",
    "float_type": "not a number; write it without quotes",
    "bool_type": "neither true nor false; write one of them without quotes",
    "dict_type": "not a mapping; write key: value",
    "model_type": "not a section; write key: value below it",
    "list_type": "not a list; write [a, b] or one `- entry` per line",
    "tuple_type": "not a list; write [a, b]",
    "finite_number": "not a finite number; choose one",
    "too_short": "empty; add at least one entry",
    "too_long": "too many entries; write [a, b]",
    "string_too_short": "empty; give it a value",
}


def validate(data: dict[str, Any]) -> tuple[RunConfig | None, list[str], set[str]]:
    """Validate plain data.

    Returns:
        The configuration, with stand-ins for invalid values, or None if even stand-ins did not make it valid; one
        message per problem; the dotted keys of the stand-ins.
    """
    problems: list[str] = []
    tainted: dict[Path, None] = {}
    for _ in range(_MAX_PASSES):
        try:
            return RunConfig.model_validate(data), problems, {dotted(path) for path in tainted}
        except ValidationError as error:
            data = copy.deepcopy(data)
            for path, details in _problems_by_path(error).items():
                if any(path[: len(known)] == known for known in tainted):
                    continue  # a problem of a stand-in
                problems.append(_describe(path, details))
                replaced = _replace(data, _path_to_replace(path))
                if replaced != path or details[0]["type"] != "extra_forbidden":
                    tainted[replaced] = None
    return None, problems, {dotted(path) for path in tainted}


def validate_file(model: type[_Model], data: dict[str, Any], where: str) -> _Model:
    """Validate the plain data of a file that is no run.yaml, such as an experiment.

    Raises:
        ConfigError: with one message per problem.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_describe(path, details, model) for path, details in _problems_by_path(error, model).items()]
        raise ConfigError(where, problems) from error


def _problems_by_path(error: ValidationError, root: type[BaseModel] = RunConfig) -> dict[Path, list[Any]]:
    """Return the details of pydantic's errors by path.

    An error at a section is dropped if a key inside the section has one too, as another branch of its union.
    """
    by_path: dict[Path, list[Any]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(key_path(details["loc"], root), []).append(details)
    return {
        path: details
        for path, details in by_path.items()
        if not any(other != path and other[: len(path)] == path for other in by_path)
    }


def _path_to_replace(path: Path) -> Path:
    """Return the path, or the section around it that has to be replaced as a whole."""
    if path[:2] == ("validation", "sources") and len(path) > 2:
        return path
    return next((path[:n] for n in range(1, len(path)) if _pattern(path[:n]) in _REPLACED_AS_A_WHOLE), path)


def _replace(data: Any, path: Path) -> Path:
    """Put a stand-in at a path, or remove the key if the schema has a default.

    Returns:
        The path that was replaced. It is shorter than `path` if the data has no such entry: `warmup: -1` is short for
        `warmup: {steps: -1}`, so the path `schedule.warmup.steps` becomes `schedule.warmup`.
    """
    if not path:  # a rule over the whole file
        return path
    *parents, key = path
    holder = data
    for parent in parents:
        holder = holder[parent] if _has(holder, parent) else None
    if not (isinstance(holder, dict) or _has(holder, key)):
        return _replace(data, path[:-1])
    stand_in = copy.deepcopy(_STAND_INS.get(_pattern(path)))
    if stand_in is not None or isinstance(holder, list):
        holder[key] = stand_in
    else:
        holder.pop(key, None)
    return path


def _has(holder: Any, key: str | int) -> bool:
    if isinstance(holder, list):
        return isinstance(key, int) and key < len(holder)
    return isinstance(holder, dict) and key in holder


def _pattern(path: Path) -> str:
    """Return a path as text with stars for names of sources and list indices: `phases[*].blend.*`."""
    keys: list[str | int] = list(path)
    if keys[0] == "sources" and len(keys) > 1:
        keys[1] = "*"
    if keys[:2] == ["validation", "sources"] and len(keys) > 2:
        keys[2] = "*"
    if keys[0] == "phases" and len(keys) > 3 and keys[2] == "blend":
        keys[3] = "*"
    return re.sub(r"\[\d+\]", "[*]", dotted(tuple(keys)))


def _describe(path: Path, details: list[Any], root: type[BaseModel] = RunConfig) -> str:
    """Return the message: key, value, problem and what to do."""
    first = details[0]
    if not path and root is not RunConfig:  # a rule over the whole file, whose message names the keys
        return _reason(first)
    key = dotted(path) or "run.yaml"
    if first["type"] == "extra_forbidden":
        return f"{key}: not a known key; {nearest_key(path, root)}"
    if first["type"] == "missing":
        meaning = key_help(path, root)
        if meaning[:2].istitle():
            meaning = meaning[:1].lower() + meaning[1:]
        return f"{key}: missing; give it a value" + (f" ({meaning})" if meaning else "")
    reasons = [_reason(detail) for detail in details]
    if {detail["type"] for detail in details} == {"string_type", "list_type"}:
        reasons = ["neither text nor a list of texts; put it in quotes"]
    return f"{key}: {_shown(first.get('input'))}: {' or '.join(dict.fromkeys(reasons))}"


def _reason(details: Any) -> str:
    if details["type"] in _REASONS:
        return _REASONS[details["type"]]
    message = str(details["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."
