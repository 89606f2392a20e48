"""Loading of run.yaml with overrides and presets into a `RunConfig`, or into a list of all problems."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpt.config.checks import CHECKS
from megatron_cpt.config.overrides import apply_overrides
from megatron_cpt.config.presets import preset
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.config.validate import validate
from megatron_cpt.config.yamlfile import read_mapping
from megatron_cpt.errors import ConfigError


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

    def is_valid(self, *keys: str) -> bool:
        """Return True if neither these dotted keys nor the sections that contain them are stand-ins.

        `[*]` means any entry of a list.
        """
        tainted = {re.sub(r"\[\d+\]", "[*]", key) for key in self.tainted}
        return not any(_contains(bad, key) for key in keys for bad in tainted)

    def is_untouched(self, *keys: str) -> bool:
        """Return True if these keys, the sections that contain them and everything below them are free of stand-ins.

        `[*]` means any entry of a list.
        """
        tainted = self.tainted | {re.sub(r"\[\d+\]", "[*]", key) for key in self.tainted}
        return not any(_contains(key, bad) or _contains(bad, key) for key in keys for bad in tainted)

    def finish(self, where: str) -> RunConfig:
        """Return the configuration.

        Args:
            where: name of the configuration in the message, usually the path of the file.

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


def draft_config(data: dict[str, Any], overrides: Sequence[str] = ()) -> Draft:
    """Validate plain data; problems are collected in the result, not raised."""
    data = copy.deepcopy(data)
    problems = apply_overrides(data, overrides)
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
