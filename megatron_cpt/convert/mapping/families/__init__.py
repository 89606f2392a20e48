"""The model families that can be converted, one file each.

A new family is a file with a `Family` (its table of weights made of `common`'s lines and its own) and a name in
`FAMILIES`; docs/families.md goes through it.
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
"""By name; a model that several could express goes to the first of them."""

__all__ = ["FAMILIES", "Family", "by_name", "detect"]


def by_name(name: str) -> Family:
    """A family by its name.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise UserError(f"family {name!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(config: Mapping[str, Any], where: object = "config.json") -> Family:
    """The family of a config.json, by `model_type` and the marks of its relatives.

    Raises:
        RefusedError: none that is known.
    """
    kind = config.get("model_type")
    of_kind = [family for family in FAMILIES.values() if family.model_type == kind]
    for family in sorted(of_kind, key=lambda family: family.mark is None):
        if family.mark is None or config.get(family.mark):
            return family
    known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
    raise RefusedError(f"{where}: model_type {kind!r} is not known; known are {known}")
