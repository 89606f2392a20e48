"""Model shapes that ship with the package, one YAML file per preset."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources
from typing import Any

from megatron_cpt.config.yamlfile import parse_yaml


@cache
def preset_names() -> tuple[str, ...]:
    """Return the sorted names of the presets."""
    folder = resources.files("megatron_cpt.config") / "presets"
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")))


def preset(name: str) -> dict[str, Any]:
    """Return the fields of a preset.

    Raises:
        ValueError: if the name is unknown; the message names the nearest preset.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(preset_names())}"
        raise ValueError(f"no preset of that name; {hint}")
    text = (resources.files("megatron_cpt.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    fields: dict[str, Any] = parse_yaml(text, f"preset {name}")
    return fields
