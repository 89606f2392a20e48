"""Plain data -> a `RunConfig`, with every problem in words.

pydantic reports the problems of one pass, but stops at them. To find the problems between fields too, wrong values
are replaced by stand-ins and the data are validated again; whoever judges the result must leave the stand-ins alone,
so their keys are returned as `tainted`.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from pydantic import ValidationError

from megatron_cpt.config.fields import Path, dotted, key_help, key_path, nearest_key
from megatron_cpt.config.schema import RunConfig

_MOST_PASSES = 8

_MODEL = {"layers": 1, "hidden": 8, "ffn_hidden": 8, "heads": 1, "vocab": 8}

# What is required has no default to fall back to. Values are such that no check between fields fails by them alone.
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
    "log.wandb.project": "project",
    "log.hooks[*]": "module:Class",
}
# Sections that are wrong as a whole where one entry is: without it they would mean something else.
_WHOLE = ("batch.ramp_up", "schedule.warmup", "schedule.decay", "phases[*].until", "validation", "sources.*.fim")

_WAYS_OUT = {
    "string_type": "not text; put it in quotes",
    "int_type": "not a whole number; write digits without quotes",
    "int_from_float": "not a whole number",
    "float_type": "not a number; write it without quotes",
    "bool_type": "neither true nor false; write one of them without quotes",
    "dict_type": "not a map of keys to values",
    "model_type": "not a section of keys and values",
    "list_type": "not a list; write [a, b] or one `- entry` a line",
    "tuple_type": "not a list; write [a, b]",
    "finite_number": "not a finite number",
    "too_short": "empty; give it at least one entry",
    "string_too_short": "empty; give it a value",
}


def validate(data: dict[str, Any]) -> tuple[RunConfig | None, list[str], set[str]]:
    """Validate plain data.

    Returns:
        The configuration, with stand-ins where values were wrong (None where even those did not help); the problems,
        one line each; the dotted keys of the stand-ins.
    """
    problems: list[str] = []
    tainted: dict[Path, None] = {}
    for _ in range(_MOST_PASSES):
        try:
            return RunConfig.model_validate(data), problems, {dotted(path) for path in tainted}
        except ValidationError as error:
            data = copy.deepcopy(data)
            for path, details in _problems_by_path(error).items():
                if any(path[: len(known)] == known for known in tainted):
                    continue  # about a stand-in
                problems.append(_describe(path, details))
                replaced = _replace(data, _whole(path))
                if replaced != path or details[0]["type"] != "extra_forbidden":
                    tainted[replaced] = None
    return None, problems, {dotted(path) for path in tainted}


def _problems_by_path(error: ValidationError) -> dict[Path, list[Any]]:
    """The details of every problem; of a union those of the branch that came furthest."""
    by_path: dict[Path, list[Any]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(key_path(details["loc"]), []).append(details)
    return {
        path: details
        for path, details in by_path.items()
        if not any(other != path and other[: len(path)] == path for other in by_path)
    }


def _whole(path: Path) -> Path:
    """The path to replace when this one is wrong: itself, or a section that is nothing without it."""
    if path[:2] == ("validation", "sources") and len(path) > 2:
        return path
    return next((path[:n] for n in range(1, len(path)) if _pattern(path[:n]) in _WHOLE), path)


def _replace(data: Any, path: Path) -> Path:
    """Put a stand-in at a path, or leave the key out where the schema has a default.

    Returns:
        The path that was replaced: a shorter one where the data have no such entry, as in the short form
        `warmup: -1` of `warmup: {steps: -1}`.
    """
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
    """A path with the names of sources, and the numbers of entries, as stars."""
    keys: list[str | int] = list(path)
    if keys[0] == "sources" and len(keys) > 1:
        keys[1] = "*"
    if keys[:2] == ["validation", "sources"] and len(keys) > 2:
        keys[2] = "*"
    if keys[0] == "phases" and len(keys) > 3 and keys[2] == "blend":
        keys[3] = "*"
    return re.sub(r"\[\d+\]", "[*]", dotted(tuple(keys)))


def _describe(path: Path, details: list[Any]) -> str:
    """One line: the key, its value, what is wrong, the way out."""
    key, first = dotted(path) or "run.yaml", details[0]
    if first["type"] == "extra_forbidden":
        return f"{key}: not a known key; {nearest_key(path)}"
    if first["type"] == "missing":
        meaning = key_help(path)
        if meaning[:2].istitle():
            meaning = meaning[:1].lower() + meaning[1:]
        return f"{key}: missing; give it a value" + (f" ({meaning})" if meaning else "")
    reasons = [_reason(detail) for detail in details]
    if {detail["type"] for detail in details} == {"string_type", "list_type"}:
        reasons = ["neither text nor a list of texts; quote what YAML reads as something else"]
    return f"{key}: {_shown(first.get('input'))}: {' or '.join(dict.fromkeys(reasons))}"


def _reason(details: Any) -> str:
    if details["type"] in _WAYS_OUT:
        return _WAYS_OUT[details["type"]]
    message = str(details["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."
