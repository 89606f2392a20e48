"""`key=value` on the command line: dotted paths into run.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.errors import ConfigError

_INDEX = re.compile(r"\[(\d+)\]")


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Put each value at its dotted path, in place.

    Lists take numbers (`phases.0.until` or `phases[0].until`); entries that have a name also take that
    (`phases.general.until`). The value is read as YAML.

    Returns:
        What could not be done, one line each.
    """
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        path = _INDEX.sub(r".\1", key).split(".")
        if not separator or not all(path):
            problems.append(f"{_short(override)}: not an override; write key=value, such as parallel.tensor=2")
            continue
        try:
            problem = _set(data, path, parse_yaml(text, override))
        except ConfigError as error:
            problem = error.problems[0]
        if problem:
            problems.append(f"{_short(override)}: {problem}")
    return problems


def _short(override: str) -> str:
    return repr(override if len(override) < 60 else f"{override[:57]}...")


def _set(data: dict[str, Any], path: list[str], value: Any) -> str | None:
    """Put a value at a path; the reason if that is not possible."""
    holder: Any = data
    for number, key in enumerate(path):
        where: str | int = key
        if isinstance(holder, list):
            index = _index(holder, key)
            if index is None:
                return f"{'.'.join(path[:number])} has no entry {key!r}; it has {_entries(holder)}"
            where = index
        elif not isinstance(holder, dict):
            return f"{'.'.join(path[:number])} is a plain value: {holder!r}; nothing can be set below it"
        if number == len(path) - 1:
            holder[where] = value
            return None
        if isinstance(holder, dict):
            if key == "model" and isinstance(holder.get(key), str):  # the short form of {preset: NAME}
                holder[key] = {"preset": holder[key]}
            if holder.get(key) is None:
                holder[key] = {}
        holder = holder[where]
    return None


def _index(entries: list[Any], key: str) -> int | None:
    # By name first: a phase may be called 1.
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if key in names:
        return names.index(key)
    return int(key) if key.isdecimal() and int(key) < len(entries) else None


def _entries(entries: list[Any]) -> str:
    names = [str(entry.get("name", n)) if isinstance(entry, dict) else str(n) for n, entry in enumerate(entries)]
    return ", ".join(names) or "none"
