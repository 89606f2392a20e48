"""SmolLM and SmolLM2 (arXiv 2502.02737): small Llamas, mostly tied; their config.json says `is_llama_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_cpt.convert.mapping.families.llama import LLAMA


def _refuse(config: Mapping[str, Any]) -> list[str]:
    if config.get("rope_interleaved"):
        return ["rope_interleaved: true; RoPE here turns the halves of a head, not neighbors"]
    return []


SMOLLM = replace(
    LLAMA,
    name="smollm",
    mark="is_llama_config",
    extra={"is_llama_config": True, "rope_interleaved": False},
    refuse=_refuse,
)
