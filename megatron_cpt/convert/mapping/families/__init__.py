"""Model families that can be converted, one file per family.

To add a family, write a file with a `Family` and add it to `FAMILIES`. Its table of weights is made of the lines in
`common` and of its own lines; docs/internals/families.md has an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cpt.convert.mapping.families.base import Family
from megatron_cpt.convert.mapping.families.llama import LLAMA
from megatron_cpt.convert.mapping.families.mistral import MISTRAL
from megatron_cpt.convert.mapping.families.nemotron import NEMOTRON
from megatron_cpt.convert.mapping.families.qwen2 import QWEN2
from megatron_cpt.convert.mapping.families.qwen3 import QWEN3
from megatron_cpt.convert.mapping.families.smollm import SMOLLM
from megatron_cpt.errors import RefusedError, UserError

FAMILIES: dict[str, Family] = {family.name: family for family in (NEMOTRON, LLAMA, SMOLLM, MISTRAL, QWEN2, QWEN3)}
"""Families by name. If several families can express a model, an export chooses the first."""

__all__ = ["FAMILIES", "Family", "by_name", "detect"]


def by_name(name: str) -> Family:
    """Return a family by its name.

    Raises:
        UserError: no family has this name.
    """
    if name not in FAMILIES:
        raise UserError(f"family {name!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(config: Mapping[str, Any], where: object = "config.json") -> Family:
    """Return the family of a config.json, by its `model_type` and the families' `mark` keys.

    Raises:
        RefusedError: the model type is not known.
    """
    kind = config.get("model_type")
    of_kind = [family for family in FAMILIES.values() if family.model_type == kind]
    for family in sorted(of_kind, key=lambda family: family.mark is None):
        if family.mark is None or config.get(family.mark):
            return family
    known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
    raise RefusedError(
        f"{where}: model_type {kind!r} is not known, so its weights cannot be converted; known are {known}"
    )
