"""run.yaml, overrides and presets -> a `RunConfig`, or every problem at once."""

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
    """A configuration as far as it could be read.

    Attributes:
        config: the configuration; where there are problems, with stand-ins for what was wrong; None where too little
            is left.
        problems: one line each.
        tainted: dotted keys whose values are stand-ins, so that later checks can leave them alone.
    """

    config: RunConfig | None
    problems: list[str] = field(default_factory=list)
    tainted: set[str] = field(default_factory=set)

    def is_valid(self, *keys: str) -> bool:
        """Whether none of these dotted keys (`[*]`: any entry of a list) nor what holds them is a stand-in."""
        bad = {re.sub(r"\[\d+\]", "[*]", key) for key in self.tainted}
        return not any(_holds(b, key) for key in keys for b in bad)

    def is_untouched(self, *keys: str) -> bool:
        """Whether these dotted keys, what holds them and all that is below them are as the user wrote them.

        `[*]` means any entry of a list.
        """
        tainted = self.tainted | {re.sub(r"\[\d+\]", "[*]", key) for key in self.tainted}
        return not any(_holds(key, bad) or _holds(bad, key) for key in keys for bad in tainted)

    def finish(self, where: str) -> RunConfig:
        """The configuration, or all the problems.

        Raises:
            ConfigError: when there are any.
        """
        if self.problems or self.config is None:
            raise ConfigError(where, self.problems)
        return self.config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml and apply `key=value` overrides.

    Raises:
        UserError: the file cannot be read.
        ConfigError: with every problem.
    """
    return draft_config(read_mapping(path), overrides).finish(str(path))


def draft_config(data: dict[str, Any], overrides: Sequence[str] = ()) -> Draft:
    """Validate plain data; problems are collected, not raised."""
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
    """Put the fields of model.preset below those given beside it; the problem if there is no such preset."""
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


def _holds(outer: str, inner: str) -> bool:
    """Whether the dotted key `outer` is `inner` or holds it."""
    return inner == outer or inner.startswith((outer + ".", outer + "["))
