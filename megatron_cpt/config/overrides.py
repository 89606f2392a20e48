"""Overrides of run.yaml on the command line: `key=value`, with a dotted path as the key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.errors import ConfigError

_INDEX = re.compile(r"\[(\d+)\]")


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set each value at its dotted path, in place.

    An entry of a list is given by index (`phases.0.until`, `phases[0].until`) or by its `name`
    (`phases.general.until`). The value is parsed as YAML.

    Returns:
        One message per override that could not be applied.
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
    """Set a value at a path and return None, or return the reason why that is not possible."""
    holder: Any = data
    for number, key in enumerate(path):
        where: str | int = key
        if isinstance(holder, list):
            index = _index(holder, key)
            if index is None:
                return f"{'.'.join(path[:number])} has no entry {key!r}; choose one of {_entries(holder)}"
            where = index
        elif not isinstance(holder, dict):
            return f"{'.'.join(path[:number])} is a plain value: {holder!r}, which has no keys; set it as a whole"
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
    # Names come first: a phase may be called 1.
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if key in names:
        return names.index(key)
    return int(key) if key.isdecimal() and int(key) < len(entries) else None


def _entries(entries: list[Any]) -> str:
    names = [str(entry.get("name", n)) if isinstance(entry, dict) else str(n) for n, entry in enumerate(entries)]
    return ", ".join(names) or "none"
