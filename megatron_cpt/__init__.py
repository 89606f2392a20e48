"""Continued pretraining on megatron-core: two phases of data, one falling learning rate."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CptError": "errors",
    "ConfigError": "errors",
    "RefusedError": "errors",
    "UserError": "errors",
    "Hook": "hooks",
    "RunResult": "train.trainer",
    "TokenStream": "data",
    "Trainer": "train.trainer",
    "load_run": "config:load_config",
    "plan": "prepare:plan_run",
}
"""Public names and the modules that define them, as "module" or "module:name"; loaded when they are first used."""

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, defined_as = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), defined_as or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
