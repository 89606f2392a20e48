"""Loading of run.yaml with presets and overrides (`parallel.tensor=2`) into a `RunConfig`, or into all problems."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpt.config.checks import CHECKS
from megatron_cpt.config.presets import preset
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.config.validate import validate
from megatron_cpt.config.yamlfile import MAX_LEVELS, parse_yaml, read_mapping
from megatron_cpt.errors import ConfigError

_INDEX = re.compile(r"\[(\d+)\]")


@dataclass
class Draft:
    """Result of reading a configuration that may have problems.

    Attributes:
        config: the configuration, with stand-ins for invalid values; None if even stand-ins did not make it valid.
        problems: one message per problem.
        tainted: dotted keys whose values are stand-ins; later checks must skip them.
    """

    config: RunConfig | None
    problems: list[str] = field(default_factory=list)
    tainted: set[str] = field(default_factory=set)

    @property
    def _tainted_patterns(self) -> set[str]:
        return self.tainted | {_INDEX.sub("[*]", key) for key in self.tainted}

    def is_valid(self, *keys: str) -> bool:
        """Return True if neither these dotted keys nor the sections that contain them are stand-ins.

        `[*]` means any entry of a list.
        """
        return not any(_contains(bad, key) for key in keys for bad in self._tainted_patterns)

    def is_untouched(self, *keys: str) -> bool:
        """Return True if also everything below these keys is free of stand-ins."""
        return self.is_valid(*keys) and not any(_contains(key, bad) for key in keys for bad in self._tainted_patterns)

    def finish(self, where: str) -> RunConfig:
        """Return the configuration; `where` names it in messages, usually by the path of the file.

        Raises:
            ConfigError: with all problems, unless there are none.
        """
        if self.problems or self.config is None:
            raise ConfigError(where, self.problems)
        return self.config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml and apply `key=value` overrides.

    Raises:
        UserError: if the file cannot be read.
        ConfigError: with all problems.
    """
    return draft_config(read_mapping(path), overrides).finish(str(path))


def draft_config(
    data: dict[str, Any], overrides: Sequence[str] = (), *, saved_model: dict[str, Any] | None = None
) -> Draft:
    """Validate plain data; problems are collected in the result, not raised.

    Args:
        saved_model: model section of a run that omits its own, or where it or an override says `model: null`.
    """
    data = copy.deepcopy(data)
    _replace_null_model(data, saved_model)
    problems = apply_overrides(data, overrides)
    _replace_null_model(data, saved_model)
    unknown_preset = _apply_preset(data)
    config, found, tainted = validate(data)
    if unknown_preset:
        problems.append(unknown_preset)
        tainted.add("model")
    draft = Draft(config, problems + found, tainted)
    if config is not None:
        for check in CHECKS:
            if draft.is_valid(*check.keys):
                draft.problems.extend(check.find(config))
    return draft


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
        path = _split(key)
        if not separator or path is None:
            problems.append(f"{_short(override)}: not an override; write key=value, such as parallel.tensor=2")
            continue
        try:
            problem = _set(data, path, parse_yaml(text, override))
        except ConfigError as error:
            problem = error.problems[0]
        if problem:
            problems.append(f"{_short(override)}: {problem}")
    return problems


def set_value(data: dict[str, Any], key: str, value: Any) -> str | None:
    """Set a value at a dotted path, in place, as `apply_overrides` does.

    Returns:
        The reason why it cannot be set, or None.
    """
    path = _split(key)
    return "not a key; write it with dots, such as schedule.max_lr" if path is None else _set(data, path, value)


def _split(key: str) -> list[str] | None:
    path = _INDEX.sub(r".\1", key).split(".")
    return path if all(path) and len(path) <= MAX_LEVELS else None


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
    is_index = key.isascii() and key.isdecimal() and len(key) < 10
    return int(key) if is_index and int(key) < len(entries) else None


def _entries(entries: list[Any]) -> str:
    names = [str(entry.get("name", n)) if isinstance(entry, dict) else str(n) for n, entry in enumerate(entries)]
    return ", ".join(names) or "none"


def _replace_null_model(data: dict[str, Any], saved_model: dict[str, Any] | None) -> None:
    if data.get("model") is None:
        data.pop("model", None)
        if saved_model is not None:
            data["model"] = copy.deepcopy(saved_model)


def _apply_preset(data: dict[str, Any]) -> str | None:
    """Add the fields of `model.preset` that are not given, in place; return a message if the preset is unknown."""
    model = {"preset": data["model"]} if isinstance(data.get("model"), str) else data.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return None
    name, fields = str(model["preset"]), {key: value for key, value in model.items() if key != "preset"}
    try:
        data["model"] = {"preset": name, **preset(name), **fields}
    except ValueError as error:
        data["model"] = {**preset("tiny_nemotron"), **fields}
        return f"model.preset: {name!r}: {error}"
    return None


def _contains(outer: str, inner: str) -> bool:
    """Return True if the dotted key `outer` is `inner` or a section that contains it."""
    return inner == outer or inner.startswith((outer + ".", outer + "["))
